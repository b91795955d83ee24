"""runtime/rollouts.py: what a reward function is called with, and the trial call at the start."""

import pytest
import torch

from runtime import rollouts
from vlm.policy import Responses

ROWS = [
    {"problem": "3 + 4", "answer": "7", "choices": None, "images": [], "row": 0},
    {"problem": "5 + 4", "answer": "9", "choices": None, "images": [], "row": 1},
]
OWN = [{"solution": "seven", "answer": "7.", "level": 1}, {"solution": "nine", "answer": "9."}]
for row, own in zip(ROWS, OWN, strict=True):
    row["columns"] = own


@pytest.fixture
def reward(tmp_path):
    """rollouts.load_rewards of the functions in a file's text, each with weight 1."""

    def load(text: str, *names: str, row: dict = ROWS[0]) -> dict:
        path = tmp_path / "mine.py"
        path.write_text(text)
        return rollouts.load_rewards([f"{path}:{name}" for name in names], 64, row)

    return load


def responses(policy, texts: list[str], truncated: list[bool]) -> Responses:
    ids = []
    for text, cut in zip(texts, truncated, strict=True):
        end = [] if cut else policy.eos_ids[:1]
        ids.append(policy.processor.tokenizer(text)["input_ids"] + end)
    width = max(map(len, ids))
    tokens = torch.tensor([row + [policy.pad_id] * (width - len(row)) for row in ids])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in ids])
    zeros = torch.zeros(tokens.shape)
    return Responses(tokens, mask, zeros, zeros)


def graded(policy, functions) -> dict:
    """Two rows with two responses on the clean and one on the attacked image, the second cut."""
    clean = responses(policy, ["a", "b", "c", "d"], [False, True, False, False])
    adversarial = responses(policy, ["e", "f"], [True, False])
    texts, scores = rollouts.grade(functions, policy, ROWS, [clean, adversarial])
    assert texts == [["a", "b", "e"], ["c", "d", "f"]]
    return scores


LISTENER = """
CALLS = []
def listen(**arguments):
    CALLS.append(arguments)
    return [0.0] * len(arguments["completions"])
"""


def test_a_reward_gets_trls_arguments_by_keyword(policy, reward):
    """And the rows' columns, the data's own and ours. Ours win where both have a name."""
    functions = reward(LISTENER, "listen")
    graded(policy, functions)
    trial, call = functions["listen"][0].__globals__["CALLS"]
    assert call.keys() == trial.keys()
    ids = call.pop("completion_ids")
    assert [policy.processor.tokenizer.decode(x[:1]) for x in ids] == call["completions"]
    assert [len(x) for x in ids] == [2, 1, 1, 2, 2, 2]
    assert call == {
        "completions": ["a", "b", "e", "c", "d", "f"],
        "truncated": [False, True, True, False, False, False],
        "prompts": ["3 + 4"] * 3 + ["5 + 4"] * 3,
        "problem": ["3 + 4"] * 3 + ["5 + 4"] * 3,
        "answer": ["7"] * 3 + ["9"] * 3,
        "choices": [None] * 6,
        "row": [0] * 3 + [1] * 3,
        "solution": ["seven"] * 3 + ["nine"] * 3,
        "level": [1] * 3 + [None] * 3,
    }


FUNCTIONS = """
def as_in_trl(prompts, completions, **kwargs):
    return [float(c in "ab" and p == "3 + 4") for p, c in zip(prompts, completions)]

def own_column(completions, solution, **_):
    return [float(len(s)) for s in solution]

def no_further(completions):
    return [0.0 for _ in completions]

def first_by_place(texts, **_):
    return [0.0 for _ in texts]

def other_data(completions, gold, **_):
    return [0.0 for _ in completions]

def broken(completions, **_):
    return [1 / 0 for _ in completions]
"""


def test_functions_written_for_trl_run(policy, reward):
    scores = graded(policy, reward(FUNCTIONS, "as_in_trl", "own_column"))
    assert scores["as_in_trl"].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert scores["own_column"].tolist() == [[5] * 3, [4] * 3]


@pytest.mark.parametrize(
    "name, cause",
    [
        ("no_further", "got an unexpected keyword argument 'solution'"),
        ("first_by_place", "missing a required argument: 'texts'"),
        ("other_data", "missing a required argument: 'gold'"),
    ],
)
def test_a_function_that_trl_could_not_call_is_refused_at_the_start(reward, name, cause):
    """In one line that lists what it is called with."""
    message = f"the reward '{name}' cannot be called.*{cause}.*completions, solution, answer, level"
    with pytest.raises(ValueError, match=message) as caught:
        reward(FUNCTIONS, name)
    assert "add **_" in str(caught.value) and "\n" not in str(caught.value)


def test_a_function_that_fails_is_found_by_the_trial_call(reward):
    with pytest.raises(RuntimeError, match="the reward 'broken' failed on row 0.*division by zero"):
        reward(FUNCTIONS, "broken")


def test_rows_without_columns_of_their_own(policy, reward):
    """The demo's."""
    row = {name: value for name, value in ROWS[0].items() if name != "columns"}
    functions = reward(FUNCTIONS, "as_in_trl", row=row)
    found = rollouts.grade(functions, policy, [row], [responses(policy, ["a"], [False])])
    assert found[1]["as_in_trl"].tolist() == [[1]]
