"""A model for lm-evaluation-harness, the package `lm-eval`, of the extra `eval`; nothing else imports this module.

    lm_eval.simple_evaluate(model=Harness(model, tokenizer), tasks=["arc_easy"])

Requests are answered as the harness's own adapter of transformers answers them. In particular texts longer than
`max_length` lose their beginning, and what the tokenizer puts before a text it puts before a context.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from zamba2_jax.checkpoint.hf import load_hf
from zamba2_jax.evaluate.score import score_tokens
from zamba2_jax.inference.engine import Completion, Engine, Request
from zamba2_jax.inference.sampling import Sampling
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.text.tokenizer import Tokenizer, load_tokenizer

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GENERATION = {"until", "do_sample", "max_gen_toks", *_SAMPLING}


@register_model("zamba2")
class Harness(TemplateLM):
    """Answers the harness's requests with a model.

    Attributes:
        tokenizer: of the model; its `end_tokens` end an answer.
        max_length: most tokens of a request, those to be generated included.
    """

    max_gen_toks = 256

    def __init__(
        self,
        model: LanguageModel | str,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ):
        """Wraps a model.

        Args:
            model: the model; or a checkpoint, a directory or the id of a repository on the Hugging Face hub, with its
                tokenizer.
            tokenizer: of a model that is not a checkpoint.
            batch_size: requests at a time.
            max_length: `config.max_position_embeddings` by default.
            dtype: compute dtype of a checkpoint; as stored by default.
            device: ignored: the harness gives it to every model, and JAX has its own choice.

        Raises:
            ValueError: there is no tokenizer, or it has no token that ends a text, or batch_size is not a number.
        """
        super().__init__()
        if isinstance(model, str):
            tokenizer = tokenizer or load_tokenizer(model)
            model = load_hf(model, dtype=dtype)
        end = None if tokenizer is None else tokenizer.special_id("eos_token")
        if tokenizer is None or end is None:
            raise ValueError(f"tokenizer={tokenizer!r}: expected one with an eos_token")
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size={batch_size!r}: expected a number")
        self.tokenizer = tokenizer
        self.max_length = max_length or model.config.max_position_embeddings
        self._model, self._end, self._batch_size = model, end, int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, or else the one that ends a text."""
        begin = self.tokenizer.special_id("bos_token")
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells its caches apart."""
        return "zamba2"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with what the tokenizer adds, unless the text begins with it already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.special_tokens.get("bos_token"))
        return self.tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, with the beginning of an answer."""
        if not add_generation_prompt:
            raise ValueError("the chat template is written with a generation prompt: expected add_generation_prompt")
        return self.tokenizer.render(chat_history)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        found = score_tokens(self._model, rows, batch=self._batch_size)
        answers = []
        for (request, _, continuation), (log_p, likeliest) in zip(requests, found, strict=True):
            n = len(continuation)
            answers.append((float(log_p[-n:].sum()) if n else 0.0, bool(likeliest[-n:].all()) if n else True))
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each token given as much before it as `max_length` has room for."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += mine
            owners += [i] * len(mine)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string or a token that ends a text, by the tokenizer or the checkpoint.

        Request i is drawn with seed i where it is drawn at all.
        """
        jobs = [self._request(*request.args, seed=i) for i, request in enumerate(requests)]
        engine = Engine.for_requests(self._model, jobs, slots=self._batch_size, tokenizer=self.tokenizer)
        # Of like lengths together: those that begin together end together more often.
        order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i].prompt))
        of_number = {engine.submit(jobs[i]): i for i in order}
        texts = [""] * len(jobs)
        for event in engine.events(streaming=False):
            if isinstance(event, Completion):
                i = of_number[event.request]
                # An ending token that is not special has text, which the harness's own adapter gives too.
                text = self.tokenizer.decode(event.tokens)
                texts[i] = postprocess_generated_text(text, list(jobs[i].stop_strings), think_end_token=None)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _request(self, context: str, options: dict[str, Any], *, seed: int) -> Request:
        """What the engine is asked for."""
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        unknown = sorted(set(options) - _GENERATION)
        if unknown:
            raise ValueError(f"generation option {unknown[0]!r} is unknown, expected some of {sorted(_GENERATION)}")
        end = self.tokenizer.special_tokens["eos_token"]
        until, new = handle_stop_sequences(options.get("until"), eos=end), options["max_gen_toks"]
        if new >= self.max_length:
            raise ValueError(f"max_gen_toks={new}: expected fewer than max_length, {self.max_length}")
        how = Sampling(seed=seed, **{name: options[name] for name in _SAMPLING if options.get(name) is not None})
        return Request(
            self.tok_encode(context)[new - self.max_length :],
            new,
            how if options["do_sample"] else Sampling(repetition_penalty=how.repetition_penalty),
            stop_tokens=[id_ for id_ in self.tokenizer.end_tokens if id_ < self._model.config.vocab_size],
            stop_strings=[stop for stop in until if stop],
        )
