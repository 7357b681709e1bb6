"""SSGAN: a generative adversarial network that segments (Souly et al., ICCV 2017).

The segmenter is the discriminator: beside the classes of a voxel it knows one more, fake. It learns labels, that the
voxels of unlabeled images have some real class, and that those of a generator's images are fake; the generator learns
to make images, out of noise, that it takes for real.

Family: adversarial.
Paper: Semi Supervised Semantic Segmentation Using Generative Adversarial Network, arXiv 1703.09695.
Code: none by the authors; the details are those of an unofficial one, which has errors.
Differs from the code:
- it is experimental in 3D, where nothing is published;
- fake has no output of its own, its logit is 0; the unofficial code does the same but has the output, too;
- the generator maximizes the probability of real (`game` minimax minimizes that of fake, which hardly teaches early);
- the generator is ours: as coarse as the authors' at first, channels that halve while sides double, 100 random numbers
  in place of 2,500 (`noise`), and the unlabeled images' range in place of -1 to 1;
- generated images do not move the running statistics of the segmenter's batch norms, which are for real images;
- the segmenter has the run's optimizer, in place of Adam with 1e-4, and is trained from scratch;
- Dice joins cross-entropy in the supervised term (`dice` False);
- class-conditional generation from weak labels, the paper's second variant, is not here.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import softplus

from networks.generator import Generator, statistics_kept
from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Adam, Method, Phase, Preset, Stage, at_least_one, through, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        weight: of the terms on unlabeled and on generated images.
        noise: random numbers, uniform in -1 to 1, that an image is generated from.
        game: what the generator learns: non_saturating to be judged real, minimax not to be judged fake (paper).
        dice: whether Dice joins cross-entropy in the supervised term.
    """

    weight: float = 0.5
    noise: int = 100
    game: Literal["non_saturating", "minimax"] = "non_saturating"
    dice: bool = True

    def __post_init__(self):
        at_least_one(self, "noise")
        within(self, 0, float("inf"), "weight")


class SSGAN(Method):
    Config = Config
    presets = dict.fromkeys(("LA", "Pancreas"), Preset(run={"schedule": "poly"}))

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()
        self.generator = Generator(task.channels, build.spec.patch, build.spec.width, hp.noise)

    def stages(self):
        return (Stage(phases=(Phase("segment"), Phase("generate", Adam(2e-4, weight_decay=5e-4), "poly"))),)

    def trainable(self, phase):
        return [p for p in (self.generator if phase == "generate" else self.net).parameters() if p.requires_grad]

    def forward(self, batch, clock):
        hp, n, unlabeled = self.hp, len(batch.labeled.image), batch.unlabeled.image
        if clock.phase == "generate":
            image = self.generated(unlabeled if len(unlabeled) else batch.image)
            with statistics_kept(self.net):
                score = realness(through(self.net, image))
            loss = softplus(-score) if hp.game == "non_saturating" else -softplus(score)
            return Losses({"adversarial": loss.mean()})
        out = self.net(batch.image)
        supervised = (segmentation if hp.dice else cross_entropy)(out.logits[:n], batch.labeled.label)
        if not len(unlabeled):
            return Losses({"supervised": supervised})
        with torch.no_grad():
            image = self.generated(unlabeled)
        with statistics_kept(self.net):
            generated = realness(self.net(image))
        real = realness(out)[n:]
        return Losses({"supervised": supervised, "real": hp.weight * softplus(-real).mean(),
                       "fake": hp.weight * softplus(generated).mean()},
                      watch={"judged_real/unlabeled": real.detach().sigmoid().mean(),
                             "judged_real/generated": generated.detach().sigmoid().mean()})

    def generated(self, image):
        """As many new images as these, within the range that each channel has in them."""
        axes = (0, *range(2, image.ndim))
        low, high = (bound(axes, keepdim=True).float() for bound in (image.amin, image.amax))
        noise = 2 * torch.rand(len(image), self.hp.noise, device=image.device) - 1
        return low + (high - low) * (1 + self.generator(noise)) / 2


def realness(out):
    """The logit of real against fake, (B, *space): log of the sum over the real classes of exp logit; fake's is 0."""
    return out.logits.logsumexp(1)
