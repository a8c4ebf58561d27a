"""A whole model: embedding, decoder layers, final norm and head, over packed tokens.

`forward` returns hidden states and `logits` turns the ones that are wanted into scores, so that a prefill of
thousands of tokens need not multiply all of them with the vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..quant.schemes import Scheme
from .config import ModelConfig
from .family import Family, family_of
from .kv import KV
from .layers import DecoderLayer, norm
from .norm import Norm
from .rope import Rope, RopeConfig, Rotation


class Decoder(nn.Module):
    """What Hugging Face checkpoints keep under `model.`."""

    def __init__(self, config: ModelConfig, layers: Iterable[DecoderLayer]) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        # drawing numbers that a checkpoint replaces would, on the meta device, import torch's compiler: seconds
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(layers)
        self.norm: Norm = norm(config)
        self.embedding_scale = config.embedding_scale

    @property
    def embedding_factor(self) -> float | None:
        """What embeddings are multiplied by, rounded to their dtype as Gemma rounds it; None for nothing."""
        if self.embedding_scale is None:
            return None
        return float(torch.tensor(self.embedding_scale, dtype=self.embed_tokens.weight.dtype))

    def decoder_layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, hidden_size], scaled where the family scales."""
        hidden: Tensor = self.embed_tokens(token_ids)
        factor = self.embedding_factor
        return hidden if factor is None else hidden * factor

    def ropes(self) -> dict[RopeConfig, Rope]:
        """The different ropes of the layers."""
        return {layer.rope.config: layer.rope for layer in self.decoder_layers()}

    def rotations(self, positions: Tensor) -> dict[RopeConfig, Rotation]:
        """The angles of every rope at `positions` [T]."""
        return {config: rope(positions) for config, rope in self.ropes().items()}

    def forward(self, token_ids: Tensor, positions: Tensor, kv: KV) -> Tensor:
        return self.run(self.embed(token_ids), self.rotations(positions), kv)

    def run(self, hidden: Tensor, rotations: Mapping[RopeConfig, Rotation], kv: KV) -> Tensor:
        """The layers and the final norm: embedded tokens [T, hidden_size] -> the same, for `Model.logits`."""
        update: Tensor | None = None  # of the last half layer, not added yet
        for layer in self.decoder_layers():
            hidden, update = layer.step(hidden, update, rotations[layer.rope.config], kv)
        normed: Tensor = self.norm.after(hidden, update)[1]
        return normed


class Model(nn.Module):
    """A causal language model. `scheme` is None in full precision."""

    def __init__(
        self, config: ModelConfig, family: Family, layers: Iterable[DecoderLayer], scheme: Scheme | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.family = family
        self.scheme = scheme
        self.model = Decoder(config, layers)
        self.int8_head: nn.Module | None = None  # instead of lm_head, see head.py
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, kv: KV) -> Tensor:
        """Hidden states after the final norm.

        token_ids  [T] int64, the tokens of all sequences one after another
        positions  [T] int64, of each token within its sequence
        kv         holds each sequence's past; these tokens are appended to it
        returns    [T, hidden_size]
        """
        hidden: Tensor = self.model(token_ids, positions, kv)
        return hidden

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [T, hidden_size] from `forward` -> scores of the next token [T, vocab_size], in `out` if there is one.

        (66 MB for 256 tokens of Llama 3's vocabulary: a copy would take as long as half a layer.)
        """
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        scores: Tensor
        if self.int8_head is not None:
            scores = self.int8_head(hidden, out)
        elif out is None:
            scores = functional.linear(hidden, head.weight)
        else:
            scores = torch.mm(hidden, head.weight.t(), out=out)
        cap = self.config.logit_soft_cap
        return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, the residual stream and the logits."""
        return self.model.embed_tokens.weight.dtype


def build_layer(config: ModelConfig, index: int) -> DecoderLayer:
    """Decoder layer `index` in full precision, its weights not yet loaded.

    Under `torch.device("meta")` it takes no memory.
    """
    return family_of(config.raw).layer(config, index)


def build_model(config: ModelConfig) -> Model:
    """The whole model in full precision, its weights not yet loaded; see build_layer for the meta device."""
    layers = [build_layer(config, index) for index in range(config.num_layers)]
    return Model(config, family_of(config.raw), layers)
