"""vLLM as a server: equal answers, a shared one, a kill and a restart, the token, another model."""

import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch

from engine.conftest import MODEL, differences, perturb
from vlm import engine
from vlm.engine import TOKEN, Engine, EngineError

SECRET = "a secret of the tests"


class Process:
    """`python -m vlm.engine_child` at a port of its own."""

    def __init__(self, log, model: str = MODEL):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.model, self.url = log, model, f"http://127.0.0.1:{self.port}"

    def start(self) -> "Process":
        command = [engine.PYTHON, "-m", "vlm.engine_child", "--model", self.model]
        command += ["--dtype", "float32", "--port", str(self.port)]
        environment = engine.child_environment(None) | {TOKEN: SECRET}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=engine.PROJECT, stdout=log, stderr=log
            )
        return self

    def ready(self) -> "Process":
        end = time.time() + 240
        while self.log.read_text().count("ready at") < 1 and time.time() < end:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.2)
        return self

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.write_text("")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    both = [Process(folder / f"{i}.log").start() for i in range(2)]
    for server in both:
        server.ready()
    yield both
    for server in both:
        server.kill()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv(TOKEN, SECRET)


def connect(policy, servers) -> Engine:
    return Engine(policy, MODEL, "float32", [server.url for server in servers])


def test_two_servers_share_the_prompts(policy, servers, vllm, prompts, seeds):
    with connect(policy, servers) as both:
        both.load_weights()
        found = both.sample(prompts, 4, seeds, 64)
        assert differences(policy, prompts, found)[0] < 5e-5
        assert torch.equal(found.tokens, vllm.sample(prompts, 4, seeds, 64).tokens)
        alone = both.sample(prompts[:1], 2, seeds[:1], 16)  # the second one is asked nothing
        assert len(alone.tokens) == 2


def test_two_trainers_share_a_server_and_keep_their_weights(policy, servers, vllm, prompts, seeds):
    """Each gets answers of its own weights, although the other one has sent others in between."""
    with connect(policy, servers[:1]) as one, connect(policy, servers[:1]) as other:
        one.load_weights()
        before = one.sample(prompts, 2, seeds, 32)
        other.load_weights()
        assert torch.equal(other.sample(prompts, 2, seeds, 32).tokens, before.tokens)
        found, threads = {}, []
        for name, client in (("one", one), ("other", other)):

            def ask(name=name, client=client):
                found[name] = client.sample(prompts, 2, seeds, 32)

            threads.append(threading.Thread(target=ask))
            threads[-1].start()
        for thread in threads:
            thread.join()
        assert torch.equal(found["one"].tokens, before.tokens)
        assert torch.equal(found["other"].tokens, before.tokens)
        perturb(policy)
        other.load_weights()
        assert other.compare(prompts, other.sample(prompts, 2, seeds, 32), 1.0)["logprobs"] < 5e-6


def test_a_server_that_is_killed_and_restarted_is_filled(
    policy, servers, vllm, prompts, seeds, capfd
):
    with connect(policy, servers) as both:
        both.load_weights()
        expected = both.sample(prompts, 4, seeds, 64)
        waits = [both.ask(prompts[i : i + 8], 4, seeds[i : i + 8], 64) for i in (0, 8)]
        servers[1].kill()  # in mid-generation
        servers[1].start()
        second = waits[1]()
        assert torch.equal(second.tokens, expected.tokens[32:, : second.tokens.shape[1]])
        waits[0]()
        both.load_weights()  # a part, which a fresh one would have refused
        assert torch.equal(both.sample(prompts, 4, seeds, 64).tokens, expected.tokens)
        servers[0].kill()
        servers[0].start()
        both.load_weights()
        assert torch.equal(both.sample(prompts, 4, seeds, 64).tokens, expected.tokens)
        assert "is away" in capfd.readouterr().err


def test_a_server_that_stays_away_ends_the_run(policy, servers, vllm, prompts, seeds, monkeypatch):
    with connect(policy, servers[:1]) as client:
        client.load_weights()
        monkeypatch.setattr(engine, "PATIENCE", 1)
        servers[0].kill()
        with pytest.raises(EngineError, match=r"127.0.0.1:\d+ cannot be reached .*docs/engine.md"):
            client.sample(prompts, 1, seeds, 4)
    with pytest.raises(EngineError, match="cannot be reached"):
        connect(policy, servers[:1])
    servers[0].start().ready()


def test_another_token_another_model_another_service(policy, servers, monkeypatch, capfd):
    monkeypatch.setenv(TOKEN, "wrong")
    with pytest.raises(EngineError, match=f"answers 401: set {TOKEN} to the server's") as error:
        connect(policy, servers[:1])
    assert "wrong" not in str(error.value)
    monkeypatch.setenv(TOKEN, SECRET)
    with pytest.raises(ValueError, match="has model 'confident', the trainer 'mixed': start it"):
        Engine(policy, "demo/mixed", "float32", [servers[0].url])
    with pytest.raises(ValueError, match="has dtype 'float32', the trainer 'bfloat16'"):
        Engine(policy, MODEL, "bfloat16", [servers[0].url])
    assert SECRET not in servers[0].log.read_text() + "".join(capfd.readouterr())


def test_a_server_for_others_needs_a_token():
    command = [engine.PYTHON, "-m", "vlm.engine_child", "--model", MODEL, "--host", "0.0.0.0"]
    environment = {name: x for name, x in os.environ.items() if name != TOKEN}
    done = subprocess.run(
        command, env=environment, cwd=engine.PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.search(f"error: --host 0.0.0.0 is reached by others: set {TOKEN}", done.stderr)
