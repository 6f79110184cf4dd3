"""Generation: chunked prefill and decoding of a batch of prompts over the paged cache."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ministral_jax.cache import CachePlan, PagedBatch, PagedCache, allocate_cache, plan_cache
from ministral_jax.errors import RequestError
from ministral_jax.tokenizer import TextStream, Tokenizer
from ministral_jax.transformer import Transformer

from .answer import Answer, Completion, Piece, TokenLogprob
from .chat import ChatReply, ChatStream
from .decoding import MAX_STEPS, Choice, DecodeState, Ends, Steps, compiled_steps, data_shards
from .images import ImageReader, Images, PromptImages, chunk_rows, images_of_prompts, text_alone
from .limits import answer_limit, known_cache_dtype
from .pages import PageTables
from .sampling import SamplingArrays, SamplingMode, SamplingParams, batch_arrays, batch_mode, start_history

PAGE_SIZE = 64  # tokens: a page of one layer of Ministral 8B is 256 KB in bfloat16, one efficient transfer
PREFILL_CHUNK = 512  # prompt tokens of one call: enough to keep matrix units busy, small beside a window
MIN_CHUNK, MIN_LENGTH = 16, 256  # smallest buckets: programs are compiled per power of two from here up
MAX_BATCH = 64
STREAM_SECONDS, BATCH_SECONDS = 0.05, 0.5  # how long the device may run before the host looks at the tokens


@dataclass
class Timing:
    """Seconds and tokens of the last run, compilation included on first use."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass
class _Run:
    """A batch under way: B rows, of which the first `len(prompts)` are real."""

    prompts: list[np.ndarray]
    images: Sequence[Images]
    lengths: np.ndarray
    limits: np.ndarray
    mode: SamplingMode
    sampling: SamplingArrays
    ends: Ends
    tables: PageTables
    cache: PagedCache
    plan: CachePlan
    answers: list[Answer]
    held: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


class _GeneratedText(TextStream):
    """Text of generated ids. An embedding may have more rows than the tokenizer has words: such ids have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._known_ids = tokenizer.vocabulary_size

    def feed(self, token_id: int) -> str:
        return super().feed(token_id) if token_id < self._known_ids else ""


class Generator:
    """Continues prompts with a model.

    Args:
      model: a filled Transformer.
      tokenizer: for text and the end-of-sequence token; None when only token ids are used.
      max_length: longest prompt plus answer, in tokens; None for what the model was published for.
      page_size: tokens of a cache page.
      prefill_chunk: prompt tokens of one call; a power of two.
      cache_dtype: of keys and values, one of ministral_jax.config.CACHE_DTYPES; None for that of the model.

    `timing` describes the last run, `cache_plan` and `cache_bytes` the cache it used, as planned and as allocated. With
    a model on a mesh, prompts are dealt to its data shards, and `cache_plan` is that of one of them.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        max_length: int | None = None,
        page_size: int = PAGE_SIZE,
        prefill_chunk: int = PREFILL_CHUNK,
        cache_dtype: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length = min(max_length or model.config.max_length, model.config.max_length)
        self.page_size, self.prefill_chunk = page_size, prefill_chunk
        self.shards = data_shards(model.layout)
        graph, self._weights = nnx.split(text_alone(model))
        self._reader = None if model.vision is None else ImageReader(model.vision, model.layout)
        self._steps: Steps = compiled_steps(graph)
        self.dtype = model.norm.weight[...].dtype
        self.cache_dtype = self.dtype if cache_dtype is None else known_cache_dtype(cache_dtype)
        self._kept: tuple[CachePlan, PagedCache] | None = None
        self.timing = Timing()
        self.cache_plan: CachePlan | None = None
        self.cache_bytes = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        images: Sequence[Images] | None = None,
    ) -> list[Completion]:
        """Continues every prompt (token ids) to its end; results in the order of the prompts."""
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for piece in self.stream_ids(prompts, params, images=images, seconds_per_call=BATCH_SECONDS):
            pieces[piece.index].append(piece)
        return [
            Completion(
                ids=tuple(i for piece in own for i in piece.ids),
                text="".join(piece.text for piece in own),
                finish_reason=own[-1].finish_reason or "length",
                prompt_length=len(prompt),
                logprobs=tuple(entry for piece in own for entry in piece.logprobs),
            )
            for prompt, own in zip(prompts, pieces, strict=True)
        ]

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
    ) -> ChatStream:
        """The answer to a conversation, piece by piece; see `ChatStream`. Greedy by default."""
        return ChatStream(self, messages, params, tools=tools, reasoning_effort=reasoning_effort)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
    ) -> ChatReply:
        """The whole answer to a conversation: text, reasoning and tool calls. Greedy by default."""
        stream = self.stream(messages, params, tools=tools, reasoning_effort=reasoning_effort)
        for _ in stream:
            pass
        return stream.reply

    def stream_ids(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        images: Sequence[Images] | None = None,
        seconds_per_call: float = STREAM_SECONDS,
    ) -> Iterator[Piece]:
        """Continues prompts of token ids, yielding pieces as they come.

        Args:
          prompts: token ids, each with at least one.
          params: one for all prompts or one for each; greedy by default.
          images: for each prompt the pixels of its images, as `Tokenizer.encode_chat` gives them.
          seconds_per_call: about how long the device decodes before the host sees the tokens.

        Raises RequestError before any work for prompts that are empty, too long, or outside the vocabulary, and for
        images that are not those of the prompt's image tokens.
        """
        every = [params or SamplingParams()] * len(prompts) if isinstance(params, SamplingParams | None) else params
        if len(every) != len(prompts):
            raise RequestError(f"{len(every)} sampling params for {len(prompts)} prompts: give one, or one for each")
        pictures = images_of_prompts(self.model.config.vision, prompts, images)
        check = functools.partial(
            answer_limit,
            vocab_size=self.model.config.vocab_size,
            max_length=self.max_length,
            has_tokenizer=self.tokenizer is not None,
        )
        limits = [check(f"prompt {i}", *request) for i, request in enumerate(zip(prompts, every, strict=True))]
        self.timing = Timing()
        for start in range(0, len(prompts), MAX_BATCH):
            part = slice(start, start + MAX_BATCH)
            yield from self._run(
                start, prompts[part], pictures[part], list(every[part]), limits[part], seconds_per_call
            )

    def _run(
        self,
        first_index: int,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Images],
        params: list[SamplingParams],
        limits: list[int],
        seconds_per_call: float,
    ) -> Iterator[Piece]:
        run = self._begin(first_index, prompts, images, params, limits)
        began = time.perf_counter()
        hidden = self._prefill(run)
        state, choice = self._steps.start(
            self._weights,
            hidden,
            self._rows(run.lengths),
            run.ends,
            run.sampling,
            self._rows(start_history([p.tolist() for p in run.prompts], self.model.config.vocab_size, run.mode)),
            mode=run.mode,
        )
        first = jax.tree.map(lambda x: np.asarray(x)[None], choice)
        self.timing.prefill_seconds += time.perf_counter() - began
        self.timing.prompt_tokens += int(run.lengths.sum())
        yield from self._hand_out(run, first, np.ones((1, len(params)), bool))
        n_steps = 1
        while any(answer.finish_reason is None for answer in run.answers):
            began = time.perf_counter()
            state, steps, pieces = self._decode(run, state, n_steps)
            seconds = time.perf_counter() - began
            self.timing.decode_seconds += seconds
            # Doubling at most: the first call may have compiled, and its time says nothing about a step.
            # Several processes have to come to the same number, and their clocks do not.
            fitting = seconds_per_call / max(seconds / steps, 1e-6) if jax.process_count() == 1 else MAX_STEPS
            n_steps = int(np.clip(fitting, 1, min(2 * n_steps, MAX_STEPS)))
            yield from pieces
        self._kept = (run.plan, run.cache)

    def _begin(
        self,
        first_index: int,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Images],
        params: list[SamplingParams],
        limits: list[int],
    ) -> _Run:
        """Lays out the batch: what a shard holds and the cache's length are powers of two, so that few programs are
        compiled."""
        B = self.shards * _bucket(-(-len(prompts) // self.shards), 1)
        real = [np.asarray(prompt, np.int32) for prompt in prompts]
        spare = B - len(prompts)
        lengths = np.array([len(prompt) for prompt in real] + [0] * spare, np.int32)
        longest = max(len(p) + limit for p, limit in zip(real, limits, strict=True))
        length = min(_bucket(longest, MIN_LENGTH), self.max_length)
        plan = plan_cache(
            self.model.config,
            batch=B // self.shards,
            length=length,
            chunk=max(self.prefill_chunk, MAX_STEPS),
            page_size=self.page_size,
            dtype=self.cache_dtype,
            layout=self.model.layout,
        )
        padded = params + [SamplingParams(seed=0)] * spare
        stop_ids = [self._stop_ids(p) for p in params]
        width = max(1, *(len(ids) for ids in stop_ids))
        stops = np.full((B, width), -1, np.int32)
        for row, ids in zip(stops, stop_ids, strict=False):
            row[: len(ids)] = ids
        answers = [
            Answer(first_index + i, p, limit, ids, _GeneratedText(self.tokenizer) if self.tokenizer else None)
            for i, (p, limit, ids) in enumerate(zip(params, limits, stop_ids, strict=True))
        ]
        all_limits = np.array(limits + [0] * spare, np.int32)
        return _Run(
            prompts=real + [np.zeros(0, np.int32)] * spare,
            images=images,
            lengths=lengths,
            limits=all_limits,
            mode=batch_mode(params),
            sampling=self._rows(batch_arrays(padded)),
            ends=self._rows(Ends(jnp.asarray(stops), jnp.asarray(all_limits))),
            tables=PageTables(plan, B, self.shards),
            cache=self._take_cache(plan),
            plan=plan,
            answers=answers,
            held=lengths.copy(),
        )

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        eos = [] if self.tokenizer is None or params.ignore_eos else [self.tokenizer.eos_id]
        return sorted({*params.stop_ids, *eos})

    def _take_cache(self, plan: CachePlan) -> PagedCache:
        """The pools of the last run if they fit, else new ones, after letting go of the old."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == plan:
            return kept[1]
        del kept
        self.cache_plan = plan
        cache = allocate_cache(self.model.config, plan, self.cache_dtype, self.model.layout)
        self.cache_bytes = cache.n_bytes
        return cache

    def _prefill(self, run: _Run) -> jax.Array:
        """Runs all prompts through the model in packed chunks; returns each last token's hidden state, [B, D].

        Each data shard has a chunk of its own in every call, of up to `prefill_chunk` rows.
        """
        B = len(run.lengths)
        images = self._read_images(run)
        hidden = self._rows(np.zeros((B, self.model.config.dim), self.dtype))
        done = np.zeros(B, np.int32)
        while (done < run.lengths).any():
            counts = self._next_counts(run.lengths - done)
            for b in np.flatnonzero(counts).tolist():
                run.tables.advance(b, int(done[b]), int(done[b] + counts[b]))
            by_shard = counts.reshape(self.shards, -1)
            starts = np.pad(np.cumsum(by_shard, axis=1, dtype=np.int32), ((0, 0), (1, 0)))  # [shards, B / shards + 1]
            width = _bucket(int(starts.max()), min(MIN_CHUNK, self.prefill_chunk))
            tokens = np.zeros((self.shards, width), np.int32)
            for b in np.flatnonzero(counts).tolist():
                shard, i = divmod(b, by_shard.shape[1])
                tokens[shard, starts[shard, i] : starts[shard, i + 1]] = run.prompts[b][done[b] : done[b] + counts[b]]
            in_chunk = chunk_rows(images, done, counts, starts, (width, self.model.config.dim), self.dtype)
            done = done + counts  # a new array: the device may still be reading the old one
            finished = (counts > 0) & (done == run.lengths)
            hidden, run.cache = self._steps.prefill(
                self._weights,
                run.cache,
                hidden,
                self._rows(tokens.reshape(-1)),
                PagedBatch(self._page_tables(run), self._rows(starts.reshape(-1)), self._rows(done)),
                self._rows(np.where(finished, starts[:, 1:].reshape(-1) - 1, -1).astype(np.int32)),
                None if in_chunk is None else self._rows(in_chunk),
            )
        return hidden

    def _read_images(self, run: _Run) -> dict[int, PromptImages]:
        """The rows of every image, by the number of the sequence."""
        pairs = enumerate(zip(run.prompts, run.images, strict=False))
        return {
            b: PromptImages(self._reader, ids, images) for b, (ids, images) in pairs if self._reader and len(images)
        }

    def _next_counts(self, left: np.ndarray) -> np.ndarray:
        """Tokens of the next chunk by sequence, [B]: each shard fills its rows with its own sequences in turn."""
        by_shard = left.reshape(self.shards, -1)
        before = np.cumsum(by_shard, axis=1) - by_shard
        return np.clip(self.prefill_chunk - before, 0, by_shard).astype(np.int32).reshape(-1)

    def _decode(self, run: _Run, state: DecodeState, n_steps: int) -> tuple[DecodeState, int, list[Piece]]:
        running = np.array([answer.finish_reason is None for answer in run.answers])
        for b in np.flatnonzero(running).tolist():
            start = int(run.held[b])
            last = int(run.lengths[b] + run.limits[b])
            run.tables.advance(b, start, min(start + n_steps, last))
        run.cache, state, produced = self._steps.decode(
            self._weights,
            run.cache,
            state,
            self._page_tables(run),
            run.ends,
            run.sampling,
            jnp.asarray(n_steps, jnp.int32),
            mode=run.mode,
        )
        choices, active, steps = jax.device_get((produced.choices, produced.active, produced.n_steps))
        run.held += active[:steps].sum(axis=0, dtype=np.int32)
        pieces = list(self._hand_out(run, jax.tree.map(lambda x: x[:steps], choices), active[:steps]))
        ended = np.array([answer.finish_reason is not None for answer in run.answers])
        for b in np.flatnonzero(running & ended).tolist():
            run.tables.release(b)
        still = np.zeros(len(run.lengths), bool)
        still[: len(ended)] = ~ended
        return state._replace(active=state.active & self._rows(still)), int(steps), pieces

    def _hand_out(self, run: _Run, choices: Choice, active: np.ndarray) -> Iterator[Piece]:
        """Gives each sequence its tokens of one call ([steps, B]) and yields what came of it."""
        for b, answer in enumerate(run.answers):
            if answer.finish_reason is not None:
                continue
            for step in np.flatnonzero(active[:, b]).tolist():
                top = zip(choices.top_ids[step, b].tolist(), choices.top_logprobs[step, b].tolist(), strict=True)
                answer.push(TokenLogprob(int(choices.tokens[step, b]), float(choices.logprobs[step, b]), tuple(top)))
                self.timing.new_tokens += 1
            piece = answer.take()
            if piece is not None:
                yield piece

    def _page_tables(self, run: _Run) -> tuple[jax.Array, ...]:
        # A copy: the host goes on changing its tables while the device may still read these.
        return tuple(
            self._rows(table.copy(), "sequence" if group.context > 1 else None)
            for table, group in zip(run.tables.tables, run.plan.groups, strict=True)
        )

    def _rows(self, tree: Any, *axes: str | None) -> Any:
        """Host arrays with an entry per sequence or packed row, on the devices that have those."""
        layout = self.model.layout
        return jax.tree.map(jnp.asarray, tree) if layout is None else layout.put(tree, "rows", *axes)


def _bucket(n: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())
