"""What one tiny family is: a network to build, what its file says about itself, and what it is conditioned on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Text:
    """The conditioning that a family expects.

    Attributes:
        width: Features of the text embedding; the tiny text encoders produce the same.
        fixed_tokens: Length of a prompt in tokens where the encoder pads to it; 0 where prompts differ.
        random: Further conditioning tensors by name, by shape; -1 stands for the number of tokens.
        constants: Further conditioning values by name.
        listed: Names among `random` that the host expects in a list.
        masked: The encoder hands on an attention mask; here no token is padding.
        t5_tokens: Length of a second prompt given as token ids with weights; 0 where there is none.
    """

    width: int
    fixed_tokens: int = 0
    random: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    t5_tokens: int = 0
    masked: bool = False

    def sample(self, seed: int) -> list[list[object]]:
        """A CONDITIONING; prompts of different lengths, so that the balance between them matters."""
        generator = torch.Generator().manual_seed(seed)
        tokens = self.fixed_tokens * (1 + seed % 2) if self.fixed_tokens else 6 + seed % 7
        text = torch.randn(1, tokens, self.width, generator=generator)
        extra: dict[str, object] = dict(self.constants)
        for name, shape in self.random.items():
            value = torch.randn([tokens if size == -1 else size for size in shape], generator=generator)
            extra[name] = [value] if name in self.listed else value
        if self.masked:
            extra["attention_mask"] = torch.ones(1, tokens)
        if self.t5_tokens:
            extra["t5xxl_ids"] = torch.randint(0, 32128, (self.t5_tokens,), generator=generator, dtype=torch.int)
            extra["t5xxl_weights"] = torch.ones(self.t5_tokens)
        return [[text, extra]]


@dataclass(frozen=True)
class Family:
    """How to build one tiny network and what its file must say about itself."""

    build: Callable[..., torch.nn.Module]
    config: dict
    text: Text
    metadata: dict[str, str] = field(default_factory=dict)


def random_state(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size: matrices by fan-in, norm scales near 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            state[name] = value.clone()
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim >= 2:
            state[name] = noise / value[0].numel() ** 0.5
        elif name.endswith((".weight", ".scale")):
            state[name] = 1 + 0.05 * noise
        else:
            state[name] = 0.02 * noise
    return state
