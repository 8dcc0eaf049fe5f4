"""Talking with a model, turn by turn."""

from collections.abc import Generator

from zamba2_jax.inference.engine import Completion, Engine, Prefix, Request
from zamba2_jax.inference.sampling import GREEDY, Sampling
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.text.tokenizer import Tokenizer


class Conversation:
    """A conversation whose cache is kept.

    Every turn writes the whole conversation by the chat template. As far as that begins with the tokens of the turn
    before, which it does with most templates, only what is new is taken in.

    Attributes:
        messages: so far, a "role" and a "content" each.
        finish: why the last answer ended, as in `Completion`; None if it was broken off.
        capacity: most tokens of the conversation.
        taken_in: tokens that the last turn took in, its own included.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        stop_tokens: tuple[int, ...] = (),
        system: str | None = None,
        capacity: int | None = None,
        special_tokens: bool = True,
    ):
        """A conversation without turns.

        Args:
            model: the model.
            tokenizer: with a chat template.
            stop_tokens: an answer ends with the first of these.
            system: a message of the role "system" that stands first.
            capacity: most tokens; `config.max_position_embeddings` by default.
            special_tokens: whether names of special tokens in what is said become these tokens; else they stay text.

        Raises:
            ValueError: capacity is below 1.
        """
        self._engine = Engine(model, slots=1, capacity=capacity, tokenizer=tokenizer)
        self._tokenizer, self._stop_tokens, self._special_tokens = tokenizer, stop_tokens, special_tokens
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.capacity = self._engine.capacity
        self.restart()

    def restart(self) -> None:
        """Forgets all turns."""
        self._prefix: Prefix | None = None
        self.messages = list(self._system)
        self.finish: str | None = None
        self.taken_in = 0

    def ask(self, text: str, max_new_tokens: int, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
        """Says something, and gives the answer piece by piece.

        What has been given of an answer stays in the conversation, also if the iterator is closed before its end.

        Args:
            text: what is said.
            max_new_tokens: most tokens of the answer; fewer if the capacity has no room for as many.
            sampling: how they are chosen.

        Raises:
            ValueError: when the first piece is asked for: the template does not take the conversation, or the capacity
                has no room for it. It is then as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._tokenizer.encode_chat(messages, special_tokens=self._special_tokens)
        room = self.capacity - len(tokens)
        if room < 1:
            raise ValueError(f"the conversation has {len(tokens)} tokens: expected fewer than {self.capacity}")
        self._take_in(tokens[:-1])
        request = Request(tokens[-1:], min(max_new_tokens, room), sampling, self._stop_tokens, prefix=self._prefix)
        number, answer = self._engine.submit(request), ""
        self.finish = None
        try:
            for event in self._engine.events():
                if isinstance(event, Completion):
                    self.finish = event.finish
                else:
                    answer += event.text
                    yield event.text
        finally:
            self._engine.cancel(number)
            self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _take_in(self, tokens: list[int]) -> None:
        """Makes the prefix hold these tokens."""
        known = [] if self._prefix is None else self._prefix.tokens.tolist()
        if tokens[: len(known)] != known:
            known, self._prefix = [], None
        new = tokens[len(known) :]
        self.taken_in = len(new) + 1
        if new:
            self._prefix = self._engine.prefix(new, after=self._prefix)
