"""Further decoders on the encoder of a network: what they are, how they upsample, and who knows of them."""

import copy

import pytest
import torch
from torch import nn

import networks
from networks import checkpointing
from networks.base import Branch, NetSpec
from networks.checkpointing import recompute_stages
from networks.compiled import compile_networks
from networks.vnet import enlarge
from ssl4mis.passes import count_samples

CHOOSING = ("vnet", "resvnet", "unet", "voxresnet")
STEP = torch.tensor([[[[0.0, 3.0], [0.0, 3.0]]]])


def make(name="vnet", dims=2, **settings):
    torch.manual_seed(0)
    return networks.Build(name, 3, NetSpec(1, (64, 32, 32)[:dims], 2))(**settings)


def image(net, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, *(64, 32, 32)[:net.backbone.spatial_dims], generator=generator)


@pytest.mark.parametrize("name", networks.NAMES)
def test_a_branch_is_another_decoder_with_the_heads_of_the_network(name):
    net = make(name, heads={"seg": 3, "aux": (2, 1)})
    before = list(net.state_dict())
    net.add_branch()
    keys = list(net.state_dict())
    assert keys[:len(before)] == before and all(key.startswith("branches.0.") for key in keys[len(before):])
    net.eval()
    main = net(image(net))
    other = net.branches[0](main.features.encoder)
    assert {key: x.shape for key, x in main.heads.items()} == {key: x.shape for key, x in other.heads.items()}
    assert [x.shape for x in main.features.decoder] == [x.shape for x in other.features.decoder]
    assert other.features.encoder is main.features.encoder and not torch.equal(main.logits, other.logits)
    torch.testing.assert_close(net.branches[0](net.encode(image(net))).logits, other.logits)
    other.logits.sum().backward()
    assert all(p.grad is not None for p in net.branches[0].decoder.parameters())
    assert all(p.grad is None for p in net.backbone.decoder.parameters())
    assert any(p.grad is not None for p in net.backbone.parameters()), "the encoder learns from it"


def test_other_heads():
    net = make(heads={"seg": 3, "aux": (2, 1)})
    net.add_branch(heads={"sdf": 5})
    assert net.branches[0](net.encode(image(net))).heads.keys() == {"sdf"}


def way(decoder):
    """How a decoder upsamples, by what it is made of."""
    if any(isinstance(m, nn.ConvTranspose2d | nn.ConvTranspose3d) for m in decoder.modules()):
        return "transposed"
    (mode,) = {decoder.mode} if hasattr(decoder, "mode") else {m.mode for m in decoder.modules()
                                                               if isinstance(m, nn.Upsample)}
    return "linear" if mode in ("bilinear", "trilinear") else mode


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", CHOOSING)
def test_decoders_that_upsample_in_other_ways(name, dims):
    net = make(name, dims)
    assert sorted(net.backbone.upsamplings) == ["linear", "nearest", "transposed"]
    for upsampling in (None, *net.backbone.upsamplings):
        net.add_branch(upsampling)
    shapes = [[p.shape for p in branch.parameters()] for branch in net.branches]
    assert shapes[0] == shapes[1] == [p.shape for p in (*net.backbone.decoder.parameters(), *net.heads.parameters())]
    skips, channels = net.eval().encode(image(net)), net.backbone.decoder_channels
    maps = [branch(skips).features.decoder for branch in net.branches]
    assert all([x.shape[1] for x in found] == list(channels) for found in maps)
    assert [way(branch.decoder) for branch in net.branches] == [net.backbone.upsamplings[0], *net.backbone.upsamplings]


@pytest.mark.parametrize("name", [name for name in networks.NAMES if name not in CHOOSING])
def test_networks_without_a_choice_give_their_own(name):
    net = make(name)
    net.add_branch("linear")
    assert [p.shape for p in net.branches[0].decoder.parameters()] \
        == [p.shape for p in net.backbone.decoder.parameters()]


def test_linear_in_a_v_net_keeps_the_corners():
    """0 and 3 become 0, 1, 2, 3; by the nearest voxel 0, 0, 3, 3."""
    expected = {"linear": [0.0, 1.0, 2.0, 3.0], "nearest": [0.0, 0.0, 3.0, 3.0]}
    for upsampling, row in expected.items():
        torch.testing.assert_close(enlarge(2, 1, 1, upsampling)[0](STEP)[0, 0], torch.tensor([row] * 4))
    with pytest.raises(KeyError):
        enlarge(2, 1, 1, "cubic")


def test_linear_in_the_u_net_does_not():
    net = make("unet", dropout=())
    seen, decoder = [], net.backbone.decoder
    decoder.stages[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    skips = [torch.zeros_like(x) for x in net.encode(image(net))]
    skips[-1] = skips[-1] + torch.tensor([0.0, 3.0])
    decoder(skips)
    torch.testing.assert_close(seen[0][0, -1, 0], torch.tensor([0.0, 0.75, 2.25, 3.0]))


@pytest.mark.parametrize("name", CHOOSING)
def test_a_network_of_which_the_own_decoder_upsamples_in_another_way(name):
    way = make(name).backbone.upsamplings[2]
    net = make(name, upsampling=way)
    net.add_branch()
    plain = make(name)
    plain.add_branch(way)
    shapes = [[p.shape for p in decoder.parameters()]
              for decoder in (net.backbone.decoder, net.branches[0].decoder, plain.branches[0].decoder)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_samples_of_branches_are_decoded_by_their_network():
    holder = nn.ModuleDict({"net": make(), "other": make()})
    for _ in range(2):
        holder["net"].add_branch()
    counts, x = count_samples(holder), image(holder["net"], 4)
    skips, (first, second) = holder["net"](x).features.encoder, holder["net"].branches
    first(skips)
    second([skip[:2] for skip in skips])
    with torch.no_grad():
        first(skips)
    assert counts == {("net", "encoded", True): 4, ("net", "decoded", True): 4 + 4 + 2, ("net", "decoded", False): 4}


def test_branches_are_compiled():
    net = make()
    net.add_branch()
    assert compile_networks(nn.ModuleList([net]), backend="eager") == 2
    assert all(m._compiled_call_impl for m in net.modules() if isinstance(m, Branch)) and net._compiled_call_impl


def test_branches_are_checkpointed(monkeypatch):
    net, calls, real = make(), [], checkpointing.checkpoint
    net.add_branch("linear")
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    recompute_stages(net)
    skips = net.encode(image(net))
    calls.clear()
    net.branches[0](skips).logits.sum().backward()
    assert len(calls) == len(net.backbone.decoder_channels)


def test_a_copy_has_branches_of_its_own():
    net = make()
    net.add_branch()
    twin = copy.deepcopy(net)
    assert twin.state_dict().keys() == net.state_dict().keys()
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twin.parameters()}
