"""A segmenter that corrects an earlier one instead of starting from nothing."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

STEP = 1 / 255  # probabilities are stored in these steps, so 0 means anything below half of one


class Refinement(nn.Module):
    """Adds the log odds of an earlier net, the last input channel, to the first output channel.

    What the net adds to that channel passes a gain that starts at zero (ReZero, Bachlechner et al. 2020,
    arXiv:2003.04887): untrained, the channel is what the earlier net said, and training can only be spent on
    what it got wrong and on the other channels.

    Coarser answers of a net under deep supervision are left as they are: they only teach its features.

    net: takes (b, c, d, h, w) and returns logits (b, k, d, h, w), in training possibly with coarser ones.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b k d h w"] | list[Tensor]:
        out = self.net(inputs)
        logits = out if isinstance(out, Tensor) else out[0]
        earlier = torch.logit(inputs[:, -1:], eps=STEP / 2)
        refined = torch.cat([earlier + self.gain * logits[:, :1], logits[:, 1:]], dim=1)
        return refined if isinstance(out, Tensor) else [refined, *out[1:]]
