"""AdvSemSeg: adversarial learning for semi-supervised segmentation (Hung et al., BMVC 2018).

A fully convolutional critic learns to tell, place by place, a segmenter's probabilities from one-hot labels. The
segmenter learns to fool it; on unlabeled images it also learns its own labels where the critic takes them for true.

Family: adversarial.
Paper: Adversarial Learning for Semi-Supervised Semantic Segmentation, arXiv 1802.07934.
Code: hfslyc/AdvSemiSeg, train.py, with the weights of its README (2D).
Differs from the code:
- the critic halves the sides four times, since five would leave 3 x 3 x 2 places of a patch in 3D (`halvings` 5), and
  its width follows the segmenter's;
- labeled and unlabeled images come in equal numbers through the segmenter at once, each half was a pass of its own;
- the segmenter has the run's optimizer, in place of SGD with 2.5e-4, and is trained from scratch;
- Dice joins cross-entropy in the supervised term (`dice` False);
- every voxel has a label: there are no void ones to leave out.
"""
from dataclasses import dataclass

from torch.nn.functional import interpolate, one_hot, softplus

from networks.discriminator import PatchDiscriminator, sized
from ssl4mis.batch import Losses
from ssl4mis.losses import cross_entropy, segmentation
from ssl4mis.method import Adversarial, Preset, at_least_one, through, within


@dataclass(frozen=True)
class Config:
    """Hyper-parameters.

    Args:
        adversarial_labeled: weight of fooling the critic on labeled images (0.1 by default in the authors' script).
        adversarial_unlabeled: weight of fooling the critic on unlabeled images.
        self_training: weight of the cross-entropy to the segmenter's own labels.
        threshold: how probable the critic must find it that a place is labeled for that, 0 to 1.
        start: share of the run without self-training.
        halvings: how many levels of the critic halve the sides (5 in the authors' code).
        critic_rate: first learning rate of the critic's Adam, on the poly schedule.
        dice: whether Dice joins cross-entropy in the supervised term.
    """

    adversarial_labeled: float = 0.01
    adversarial_unlabeled: float = 0.001
    self_training: float = 0.1
    threshold: float = 0.2
    start: float = 0.25
    halvings: int = 4
    critic_rate: float = 1e-4
    dice: bool = True

    def __post_init__(self):
        at_least_one(self, "halvings")
        within(self, 0, float("inf"), "adversarial_labeled", "adversarial_unlabeled", "self_training")
        within(self, 0, 1, "threshold", "start")
        within(self, 1, 5, "halvings")


class AdvSemSeg(Adversarial):
    Config = Config
    presets = dict.fromkeys(("LA", "Pancreas"), Preset(run={"schedule": "poly"}))

    def __init__(self, build, task, hp):
        super().__init__(build, task, hp)
        self.net = build()
        self.critic = PatchDiscriminator(task.spatial_dims, task.classes, **sized(build), halvings=hp.halvings)

    def segment(self, batch, clock):
        hp, n, label = self.hp, len(batch.labeled.image), batch.labeled.label
        logits = self.net(batch.image).logits
        probability = logits.softmax(1)
        self.predicted = probability.detach()  # what the critic sees in its turn
        verdict = enlarged(through(self.critic, probability), label.shape[1:])
        terms = {"supervised": (segmentation if hp.dice else cross_entropy)(logits[:n], label),
                 "adversarial/labeled": hp.adversarial_labeled * softplus(-verdict[:n]).mean()}
        if not len(batch.unlabeled.image):
            return Losses(terms)
        trusted = verdict[n:].detach().sigmoid() >= hp.threshold
        own = cross_entropy(logits[n:], logits[n:].argmax(1), trusted)
        started = clock.step >= round(hp.start * clock.total)
        return Losses(terms | {"adversarial/unlabeled": hp.adversarial_unlabeled * softplus(-verdict[n:]).mean(),
                               "self_training": hp.self_training * started * own},
                      watch={"trusted": trusted.float().mean()})

    def criticize(self, batch):
        """The losses of the critic: logits above 0 are to say that a place is labeled."""
        label = batch.labeled.label
        truth = one_hot(label.long(), self.task.classes).movedim(-1, 1).to(self.predicted.dtype)
        fake, real = (enlarged(self.critic(maps), label.shape[1:]) for maps in (self.predicted, truth))
        return Losses({"fake": 0.5 * softplus(fake).mean(), "real": 0.5 * softplus(-real).mean()},
                      watch={"judged_real/predictions": fake.detach().sigmoid().mean(),
                             "judged_real/labels": real.detach().sigmoid().mean()})


def enlarged(verdict, space):
    """Logits (B, 1, *coarse) -> (B, *space), linearly between the centers of the outermost places."""
    mode = "trilinear" if len(space) == 3 else "bilinear"
    return interpolate(verdict, size=space, mode=mode, align_corners=True)[:, 0]
