"""From a prompt and its completion, or from a chat, to tokens of which only the answers carry loss.

At prediction the model sees the tokens of the prompt alone, so training must show it the same ones, whatever a
tokenizer would merge across the border to the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from heedful import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]


@dataclass(frozen=True)
class Piece:
    """A stretch of text, learned or only read."""

    text: str
    learned: bool


def completion_pieces(prompt: str, completion: str | None, *, end: str) -> list[Piece]:
    """A prompt, and what shall follow it with the token that ends a text."""
    return [Piece(prompt, learned=False)] + ([] if completion is None else [Piece(completion + end, learned=True)])


def chat_pieces(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str) -> list[Piece]:
    """A chat as the tokenizer's template writes it: each answer is learned up to the token that ends it.

    Raises:
        UserError: The template writes earlier turns in another way once later ones follow, so that no part of its
            text is the answer as it will be generated.
    """
    pieces: list[Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], answer_next=True)
        after = render(tokenizer, messages[: i + 1], answer_next=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError(
                f"the chat template rewrites what stands before turn {i}",
                where=where,
                expected="a template under which each turn begins with the text of those before it",
                fix="give the chat as prompt and completion, written out",
            )
        answer = after[len(before) :].rstrip()  # the line break after the end token is not the model's to write
        pieces += [Piece(before[len(done) :], learned=False), Piece(answer, learned=True)]
        done = before + answer
    return pieces


def answer_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer in the tokenizer's chat template: often not the one that ends a text.

    Raises:
        UserError: The template ends an answer with no token of its own: no end could be learned.
    """
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    pieces = chat_pieces(tokenizer, chat, where="the chat template")
    token = int(tokenizer(pieces[-1].text, add_special_tokens=False)["input_ids"][-1])
    if token not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        raise UserError(
            f"a chat template that ends an answer with {tokenizer.decode([token])!r}",
            where="the chat template",
            expected="a token of its own, such as eos_token, after each answer",
            fix="mend tokenizer.chat_template, or give the chat as prompt and completion",
        )
    return token


def check_system(tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Refuse a template that leaves out what the system says, as some do without a word.

    Raises:
        UserError: It does, or it knows no such role.
    """
    said = "what the system says"
    text = render(tokenizer, [{"role": "system", "content": said}, {"role": "user", "content": "a"}], answer_next=True)
    if said not in text:
        raise UserError(
            "a chat template that leaves out the system's turns",
            where=where,
            expected="chats of the roles that it writes",
            fix="put these turns into the user's, or mend tokenizer.chat_template",
        )


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool) -> str:
    """The chat as text; with ``answer_next`` up to where the answer begins."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next))
    except TemplateError as error:  # Gemma's and Mistral's refuse roles that they do not know
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template refuses the roles {roles}: {error}",
            where="messages",
            expected="roles, in an order, that it knows",
            fix="put a system's turn into the user's that follows, or take another template",
        ) from error
    except Exception as error:  # of a broken template, whatever Python makes of it
        raise UserError(f"the chat template fails: {type(error).__name__}: {error}", where="messages") from error


def tokenize_pieces(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[Piece]], *, special: bool
) -> list[list[tuple[list[int], bool]]]:
    """The token ids of each piece, with whether they are learned.

    Args:
        special: Put the tokenizer's own special tokens (Llama's beginning of a text) before the first piece; a chat
            template writes them itself.
    """
    texts = [piece.text for pieces in rows for piece in pieces]
    heads = [text for pieces in rows for text in accumulate(piece.text for piece in pieces)]
    own, whole = (iter(_ids(tokenizer, column)) for column in (texts, heads))
    start = start_ids(tokenizer) if special else []
    return [
        _with_flags(start, _parted([next(own) for _ in pieces], [next(whole) for _ in pieces]), pieces)
        for pieces in rows
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def _parted(own: list[list[int]], heads: list[list[int]]) -> list[list[int]]:
    """The tokens of each piece within the text, or by itself where a token would reach across a border.

    Args:
        own: Of each piece alone. A tokenizer may begin every text with a blank, which has no place between pieces.
        heads: Of the text up to the end of each piece; the text's, if each begins with the one before.
    """
    befores = [[], *heads[:-1]]
    if all(head[: len(before)] == before for before, head in zip(befores, heads, strict=True)):
        return [head[len(before) :] for before, head in zip(befores, heads, strict=True)]
    return own


def _with_flags(start: list[int], ids: list[list[int]], pieces: Sequence[Piece]) -> list[tuple[list[int], bool]]:
    flagged = [(part, piece.learned) for part, piece in zip(ids, pieces, strict=True)]
    return [([*start, *flagged[0][0]], flagged[0][1]), *flagged[1:]] if flagged else []


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: nothing for GPT-2, the token that begins a text for Llama."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at]
