"""Atom as a model of lm-eval 0.4.13: `python -m atom.eval.lm_eval --model atom --model_args pretrained=DIR`.

Tokenisation, truncation and stopping are those of lm-eval's own `hf` model, so that in full precision both give the
same numbers; what differs is who runs the layers, and that logits are computed only where they are read.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from atom.errors import UnsupportedError
from atom.kernels.registry import Kernels

from .forward import TOKENS_PER_FORWARD, hidden_states, logit_chunks, right_pad
from .generate import Sampling, generate
from .load import Loaded, load

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from .engine import EngineGenerator

log = logging.getLogger(__name__)

Scored = tuple[float, bool]  # log likelihood of a continuation, and whether greedy decoding finds it
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # strings, context tokens, continuation tokens
LM_EVAL_DEVICE = "cuda:0"  # what lm-eval's command line passes when no --device was given, on any machine
MAX_PROMPT_SPREAD = 32  # prompts that generate together differ by at most so many tokens: each costs one step for all


@register_model("atom")
class AtomLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """An Atom or full-precision checkpoint, scored and sampled on its own execution path.

    pretrained       Atom checkpoint, model directory, hub id or alias; or what load.load() returned
    tokenizer        where the tokenizer lies, if not with the model
    device, dtype    "auto": the GPU in bfloat16 where there is one, else the CPU in float32
    kernels          "auto" or "reference"
    batch_size       sequences at once, or "auto": as many as make TOKENS_PER_FORWARD tokens
    max_length       context in tokens; default the model's. Longer texts lose their beginning, as in lm-eval
    add_bos_token    whether texts begin with BOS; default as the tokenizer does
    prefix_token_id  what an empty context is; default BOS, or EOS where there is none
    enable_thinking, chat_template_args, think_end_token   as for lm-eval's `hf`
    engine           generates, if given, instead of the model alone
    """

    def __init__(
        self,
        pretrained: str | Loaded,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        kernels: Kernels = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        seed: int = 1234,
        engine: "EngineGenerator | None" = None,
    ) -> None:
        super().__init__()
        if device == LM_EVAL_DEVICE and not torch.cuda.is_available():
            log.warning("lm-eval's default device %s does not exist here; running on the CPU", LM_EVAL_DEVICE)
            device = "cpu"
        self.loaded = load(pretrained, device, dtype, kernels, tokenizer) if isinstance(pretrained, str) else pretrained
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self._device = self.model.device
        self.batch_size = _batch_size(batch_size)
        self.max_batch_size = max_batch_size
        self.max_length = int(max_length) if max_length else self.model.config.max_position_embeddings
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.chat_template_args = {**(chat_template_args or {}), **thinking}
        self.think_end_token = think_end_token
        self.seed = seed
        self.engine = engine
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token; lm-eval ends texts with it: set eos_token in tokenizer_config.json"
            )

    # Tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        if self.custom_prefix_token_id is not None:
            return int(self.custom_prefix_token_id)
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of `string`; a text that already begins with BOS gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    # Scoring

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        """Log likelihood of each continuation. Requests that feed the model the same tokens are run once."""
        feeds: dict[tuple[int, ...], list[int]] = {}  # input tokens -> the requests they serve
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"request {index} has {len(context)} context and {len(continuation)} continuation tokens; both "
                    f"need one at least, and the continuation fits max_length={self.max_length}; raise max_length"
                )
            feeds.setdefault(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), []).append(index)
        results: list[Scored | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for batch in self._batches(sorted(feeds, key=lambda feed: (-len(feed), feed))):
            served = [(row, request) for row, feed in enumerate(batch) for request in feeds[feed]]
            targets = [requests[request][2] for _, request in served]
            ends = [len(batch[row]) for row, _ in served]
            scores = self._score(batch, [row for row, _ in served], ends, targets)
            for (_, request), score in zip(served, scores, strict=True):
                results[request] = score
                if (strings := requests[request][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, score)
            bar.update(len(served))
        bar.close()
        return [score for score in results if score is not None]

    @torch.inference_mode()
    def _score(
        self, feeds: Sequence[tuple[int, ...]], rows: list[int], ends: list[int], targets: list[list[int]]
    ) -> list[Scored]:
        """Score targets[i] as what follows the last len(targets[i]) places before ends[i] of feeds[rows[i]]."""
        tokens = right_pad([list(feed) for feed in feeds])
        longest = tokens.shape[1]
        places = [
            row * longest + place
            for row, end, target in zip(rows, ends, targets, strict=True)
            for place in range(end - len(target), end)
        ]
        hidden = hidden_states(self.model, tokens).flatten(0, 1)[torch.tensor(places, device=self._device)]
        wanted = torch.tensor([token for target in targets for token in target], device=self._device)
        logs = torch.empty(wanted.shape, dtype=torch.float32, device=self._device)
        is_greedy = torch.empty(wanted.shape, dtype=torch.bool, device=self._device)
        for part, logits in logit_chunks(self.model, hidden):
            logs[part] = logits.log_softmax(-1).gather(-1, wanted[part, None]).squeeze(-1)
            is_greedy[part] = logits.argmax(-1) == wanted[part]
        sizes = [len(target) for target in targets]
        pairs = zip(logs.cpu().split(sizes), is_greedy.cpu().split(sizes), strict=True)
        return [(float(log.sum()), bool(greedy.all())) for log, greedy in pairs]

    def _batches(self, feeds: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Cut feeds, longest first, into batches that are padded to their first."""
        start = 0
        while start < len(feeds):
            size = self._sequences(len(feeds[start]))
            yield list(feeds[start : start + size])
            start += size

    def _sequences(self, length: int) -> int:
        if isinstance(self.batch_size, int):
            return self.batch_size
        budget = TOKENS_PER_FORWARD.get(self._device.type, TOKENS_PER_FORWARD["cpu"])
        return max(1, min(budget // length, self.max_batch_size or budget))

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of whole texts, each cut into windows of max_length whose predictions do not overlap."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (string,) = request.args
            rolling = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in rolling]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (log, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generation

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop string, EOS or max_gen_toks; the stop is cut off."""
        jobs = []
        for index, request in enumerate(requests):
            context, options = request.args
            stop, max_new, sampling = self._read_options(options)
            limit = self.max_length - max_new
            if limit <= 0:
                raise ValueError(
                    f"max_gen_toks={max_new} leaves no room for a prompt in max_length={self.max_length}; ask for less"
                )
            tokens = self.tok_encode(context)[-limit:] or [self.prefix_token_id]
            jobs.append((stop, max_new, sampling, tokens, index))
        results = [""] * len(requests)
        bar = tqdm(total=len(jobs), disable=disable_tqdm, desc="Running generate_until requests")
        # Requests of one kind run together, prompts of like length in one batch.
        jobs.sort(key=lambda job: (repr(job[:3]), -len(job[3]), job[4]))
        for _, kind in groupby(jobs, key=lambda job: repr(job[:3])):
            for batch in [list(kind)] if self.engine is not None else self._prompt_batches(list(kind)):
                stop, max_new, sampling = batch[0][:3]
                outputs = self._continue([job[3] for job in batch], max_new, stop, sampling)
                for (*_, index), output in zip(batch, outputs, strict=True):
                    text = self.tokenizer.decode(output, skip_special_tokens=True)
                    results[index] = postprocess_generated_text(text, stop, self.think_end_token)
                    self.cache_hook.add_partial("generate_until", requests[index].args, results[index])
                bar.update(len(batch))
        bar.close()
        return results

    def _continue(self, prompts: list[list[int]], max_new: int, stop: list[str], sampling: Sampling) -> list[list[int]]:
        if self.engine is not None:
            return self.engine.generate(prompts, max_new, stop, sampling)
        return generate(self.model, prompts, max_new, functools.partial(self._is_finished, stop), sampling)

    def _read_options(self, options: dict[str, Any]) -> tuple[list[str], int, Sampling]:
        known = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(known.pop("until", None), eos)
        max_new = known.pop("max_gen_toks")
        is_drawn, temperature = known.pop("do_sample"), float(known.pop("temperature", 0.0) or 0.0)
        sampling = Sampling(
            temperature=temperature if is_drawn else 0.0,
            top_k=int(known.pop("top_k", 0) or 0),
            top_p=float(known.pop("top_p", 1.0) or 1.0),
            seed=self.seed,
        )
        if known:
            raise UnsupportedError(
                f"generation options {', '.join(sorted(known))} are not supported; supported are until, max_gen_toks, "
                "do_sample, temperature, top_k and top_p; drop them with --gen_kwargs or choose another task"
            )
        return stop, max_new, sampling

    def _prompt_batches(self, jobs: list[Any]) -> Iterator[list[Any]]:
        start = 0
        while start < len(jobs):
            longest = len(jobs[start][3])
            room = jobs[start : start + self._sequences(longest + jobs[start][1])]
            batch = [job for job in room if longest - len(job[3]) <= MAX_PROMPT_SPREAD]
            yield batch
            start += len(batch)

    def _is_finished(self, stop: Sequence[str], tokens: list[int]) -> bool:
        if tokens[-1] == self.eot_token_id or tokens[-1] in self.model.config.eos_token_ids:
            return True
        tail = max((len(string.encode()) for string in stop), default=0) + 4  # a token holds at least one byte
        text = self.tokenizer.decode(tokens[-tail:], skip_special_tokens=False)
        return any(string and string in text for string in stop)

    # Chat templates and provenance

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; a template that refuses the system role gets the conversation without it."""
        import jinja2

        render = functools.partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )
        try:
            return str(render(chat_history))
        except jinja2.exceptions.TemplateError:
            if all(message["role"] != "system" for message in chat_history):
                raise
            return str(render([message for message in chat_history if message["role"] != "system"]))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        scheme = self.model.scheme
        return {
            "model_dtype": self.loaded.dtype,
            "model_scheme": None if scheme is None else scheme.to_dict(),
            "model_path": self.loaded.path,
        }


def _batch_size(value: int | str) -> int | None:
    """lm-eval passes "8" as well as 8; None stands for "auto"."""
    if str(value).startswith("auto"):
        return None
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"batch_size is {value!r}; it must be a positive number or 'auto'")
    return int(value)
