"""The Mixer equals its formulas written out, has the paper's sizes, refuses other pictures, and learns."""

import functools

import pytest
import torch
from torch import Tensor

from lit_models.mlp_mixer import MLPMixer
from runner.errors import InputError

small = functools.partial(MLPMixer, num_classes=10, image_size=28, patch=7, channels=1, layers=2, width=12,
                          token_hidden=20, channel_hidden=24)  # fmt: skip


def shaken(network: MLPMixer) -> MLPMixer:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def written_out(state: dict[str, Tensor], images: Tensor, patch: int, layers: int) -> Tensor:
    """The paper's equation 1, a picture and a patch at a time, in double precision."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("ij,...j->...i", state[f"{name}.weight"], x) + state[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    logits = []
    kernels = state["patches.weight"].flatten(1)  # (D, C P P)
    for image in images.double():
        tokens = []
        for top in range(0, image.shape[1], patch):
            for left in range(0, image.shape[2], patch):
                tokens.append(
                    kernels @ image[:, top : top + patch, left : left + patch].flatten() + state["patches.bias"]
                )
        x = torch.stack(tokens)  # (T, D)
        for i in range(layers):
            y = norm(x, f"blocks.{i}.norm1")
            columns = [
                linear(gelu(linear(y[:, c], f"blocks.{i}.token_mlp.0")), f"blocks.{i}.token_mlp.3")
                for c in range(x.shape[1])
            ]
            x = x + torch.stack(columns, dim=1)
            y = norm(x, f"blocks.{i}.norm2")
            x = x + linear(gelu(linear(y, f"blocks.{i}.channel_mlp.0")), f"blocks.{i}.channel_mlp.3")
        logits.append(linear(norm(x, "norm").mean(dim=0), "head"))
    return torch.stack(logits)


def test_equals_the_formulas_written_out():
    network, images = shaken(small()), torch.randn(3, 1, 28, 28)
    expected = written_out(network.state_dict(), images, patch=7, layers=2)
    assert expected.std() > 1e-2
    torch.testing.assert_close(network(images).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("patch", "layers", "width", "millions"), [(16, 8, 512, 18.5), (16, 12, 768, 59.9), (32, 12, 768, 60.3)]
)
def test_the_papers_networks_have_its_sizes(patch, layers, width, millions):
    """Table 1 has 18, 59 and 60 million, cut off."""
    with torch.device("meta"):
        network = MLPMixer(patch=patch, layers=layers, width=width)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_patches_are_mixed_by_place():
    """Unlike attention's: the same patches in another order are another picture."""
    network, images = shaken(small()), torch.rand(1, 1, 28, 28)
    assert not torch.allclose(network(images), network(images.roll(7, dims=3)), atol=1e-4)


@pytest.mark.parametrize(("shape", "words"), [((1, 1, 28, 35), "28 x 35: set model.image_size"),
                                              ((1, 1, 56, 56), "28 x 28 pixels, and the pictures have 56 x 56"),
                                              ((1, 1, 28, 30), "do not fill"), ((1, 3, 28, 28), "--model.channels 3")])  # fmt: skip
def test_other_pictures_are_one_line(shape, words):
    with pytest.raises(InputError, match=words):
        small()(torch.rand(shape))


@pytest.mark.parametrize(
    "arguments", [{"image_size": 30}, {"layers": 0}, {"token_hidden": 0}, {"stochastic_depth": -0.1}]
)
def test_a_wrong_argument_is_one_line(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        small(**arguments)


def test_memorises_a_batch_with_half_precision():
    torch.manual_seed(0)
    network, images, labels = small(stochastic_depth=0.1), torch.rand(6, 1, 28, 28), torch.arange(6)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(80):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = network.training_loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.nn.functional.cross_entropy(network.eval()(images), labels) < 0.2


def test_a_batch_of_one_trains():
    loss, _ = small().training_loss(torch.rand(1, 1, 28, 28), torch.tensor([3]))
    loss.backward()
    assert loss.isfinite()
