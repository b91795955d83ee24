"""The chat template: what it writes before an answer, and the token that ends one.

    chat = parts("Which is larger, <image> or <image>?", images=2)
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prefilled(processor)  # "<think>\\n" where the template begins the answer, else ""
    turn_end(processor)  # "<|im_end|>"

Both are found by rendering small chats, so they hold for any template.
"""

from os.path import commonprefix

from jinja2 import TemplateError
from transformers.processing_utils import ProcessorMixin

QUESTION, ANSWER = "question", "\N{REFERENCE MARK} answer"  # no prefilled part begins like this


def parts(problem: str | list[dict], images: int) -> list[dict]:
    """A user's text or messages of text -> messages of parts, with a picture for each <image>.

    If no text says <image>, all pictures stand before the first user's text. Raises ValueError for
    an empty problem and for marks that do not fit the images.
    """
    messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
    if not messages[-1]["content"].strip():
        raise ValueError("the problem is empty")
    marks = sum(message["content"].count("<image>") for message in messages)
    if marks not in (0, images):
        raise ValueError(f"the problem has {marks} <image> marks for {images} images")
    chat, unmarked = [], images - marks
    for message in messages:
        content = []
        if message["role"] == "user":
            content = [{"type": "image"}] * unmarked
            unmarked = 0
        for i, text in enumerate(message["content"].split("<image>")):
            if i > 0:
                content.append({"type": "image"})
            if text:
                content.append({"type": "text", "text": text})
        chat.append({"role": message["role"], "content": content})
    return chat


def render(processor: ProcessorMixin, *texts: str, prompt: bool = False) -> str:
    """A chat of texts, the user's and the assistant's in turn. prompt: and the assistant begins."""
    chat = []
    for i, text in enumerate(texts):
        role = "assistant" if i % 2 else "user"
        chat.append({"role": role, "content": [{"type": "text", "text": text}]})
    return processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)


def check_template(processor: ProcessorMixin) -> None:
    """Raises ValueError for a template that is broken or knows no parts of a message."""
    try:
        asked = render(processor, QUESTION, prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"the chat template cannot write a question: {type(error).__name__}: {error}"
        ) from error
    if QUESTION not in asked or "'type'" in asked:
        raise ValueError(
            "the chat template is one for text alone: it does not write the texts of a message "
            f"that is a list of parts, but {asked[:120]!r}"
        )


def prefilled(processor: ProcessorMixin) -> str:
    """What the template has already written of the answer, such as "<think>\\n", or "".

    The generation prompt is a header, which finished turns have too, and then the prefilled part.
    The finished turn is not the last one, because templates add an empty thought to that. Some add
    it to every turn, so a thought in the generation prompt is always prefilled.
    """
    opened = render(processor, QUESTION, prompt=True)
    start = len(commonprefix([opened, render(processor, QUESTION)]))
    header_end = len(commonprefix([opened, rendered_answer(processor, QUESTION)]))
    if not opened[start:header_end].strip():  # finished turns have no header to compare with
        header_end = len(opened)
    thought = opened.find("<think>", start)
    if thought >= 0:
        header_end = min(header_end, thought)
    text = opened[header_end:]
    return text if text.strip() else ""


def turn_end(processor: ProcessorMixin) -> str | None:
    """The special token behind a finished answer, or None. The last turn's: others may differ."""
    _, _, rest = rendered_answer(processor).partition(ANSWER)
    for token in processor.tokenizer.added_tokens_decoder.values():
        if token.special and rest.lstrip().startswith(token.content):
            return token.content
    return None


def rendered_answer(processor: ProcessorMixin, *further: str) -> str:
    """A chat with a finished answer, or "" if the template refuses one."""
    try:
        return render(processor, QUESTION, ANSWER, *further)
    except (TemplateError, TypeError, ValueError):
        return ""
