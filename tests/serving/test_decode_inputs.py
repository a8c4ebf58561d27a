"""What a decode step's first kernel finds on the host: applied as it says, its buffers are the batch's arrays."""

import random

import pytest
import torch

from atom.kernels import begin
from atom.models.dummy import dummy_source
from atom.models.loader import load_source
from atom.serving.batch import Batch, Step
from atom.serving.decode_inputs import KernelInputs
from atom.serving.request import Request
from atom.serving.sampling_params import SamplingParams
from atom.serving.step_inputs import is_decode, pad_decodes

from .begin_model import BeginModel
from .fake_runner import VOCAB
from .one_scheduler import engine

LANES, SIZES, MAX_BLOCKS, BLOCK = 8, (1, 2, 4, 8), 16, 4


@pytest.mark.parametrize("depth", [1, 2])
def test_buffers_are_the_batchs_arrays_whoever_comes_and_goes(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, draw, model = BeginModel(), random.Random(depth), load_source(dummy_source("tiny"))
    monkeypatch.setattr(begin, "begin_kernel", lambda: kernel)
    last_tokens = torch.zeros(LANES, dtype=torch.int64)
    inputs = KernelInputs(model, last_tokens, LANES, MAX_BLOCKS, BLOCK, depth)
    run = engine(depth, max_num_seqs=LANES, num_blocks=40)
    compute, loaded = run.runner.run, 0

    def check(batch: Batch) -> None:
        size = next(size for size in SIZES if size >= batch.num_seqs)
        padded = pad_decodes(batch, size, 40, BLOCK)
        last_tokens[:] = torch.tensor(run.runner.last)
        assert inputs.load(padded).tolist() == batch.sample_lanes.tolist()
        arrays = inputs.arrays(size)
        assert arrays.slots.tolist() == padded.slots.tolist() and arrays.lengths is not None
        assert arrays.lengths.tolist() == padded.seqlens_k.tolist()
        for row, length in enumerate(padded.seqlens_k.tolist()):
            blocks = -(-length // BLOCK)
            assert arrays.block_tables[row, :blocks].tolist() == padded.block_tables[row, :blocks].tolist()
        tokens = padded.token_ids.copy()
        tokens[batch.pending] = [run.runner.last[lane] for lane in batch.pending_lanes]
        embedding = model.model.embed_tokens.weight
        assert torch.equal(inputs.start(size)[0], embedding[torch.from_numpy(tokens).long()])

    def compute_and_check(step: Step) -> list[int]:
        nonlocal loaded
        if is_decode(step.batch):
            check(step.batch)
            loaded += 1
        return compute(step)

    monkeypatch.setattr(run.runner, "run", compute_and_check)
    for number in range(60):
        params = SamplingParams(max_tokens=draw.randint(1, 40), ignore_eos=True)
        prompt = tuple(draw.randrange(VOCAB) for _ in range(draw.randint(1, 20)))
        run.add(Request(f"r{number}", prompt, params))
        for _ in range(draw.randint(0, 20)):
            run.advance()
    run.finish()
    assert loaded > 200 and kernel.without > loaded // 2
