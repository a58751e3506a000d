"""FeatureExtractor: timm's interface, layers of plain modules, pooling, errors."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcoherence import perception_coherence_loss
from pcoherence.adapters.features import FeatureExtractor


class TimmLike(nn.Module):
    """The part of timm's interface that is used, as timm's ConvNets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.fc = nn.Linear(6, 10)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class TorchvisionLike(nn.Module):
    """Pooled to [b, c, 1, 1], flattened without a module: as torchvision's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.stem(x)).flatten(1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


IMAGES = torch.rand(5, 3, 9, 9, generator=torch.manual_seed(1))


def test_timm_models_are_pooled_by_their_head() -> None:
    model = TimmLike()
    found = FeatureExtractor(model)(IMAGES)
    assert torch.equal(found, model.forward_head(model.forward_features(IMAGES), pre_logits=True))
    assert torch.equal(model.fc(found), model(IMAGES))


def test_a_layer_by_name() -> None:
    model = TorchvisionLike()
    found = FeatureExtractor(model, "avgpool")(IMAGES)
    assert found.shape == (5, 4)
    assert torch.equal(model.fc(found), model(IMAGES))
    inner = FeatureExtractor(model, "stem.1")(IMAGES)
    torch.testing.assert_close(inner, found)  # the mean over pixels
    assert FeatureExtractor(model, "fc")(IMAGES).shape == (5, 10)


def test_pooling() -> None:
    model = TorchvisionLike()
    output = model.stem(IMAGES)
    assert torch.equal(FeatureExtractor(model, "stem", pool="flatten")(IMAGES), output.flatten(1))
    first = FeatureExtractor(model, "stem", pool=lambda t: t[:, :, 0, 0])(IMAGES)
    assert torch.equal(first, output[:, :, 0, 0])


def test_hooks_do_not_stay() -> None:
    model = TorchvisionLike()
    FeatureExtractor(model, "avgpool")(IMAGES)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        FeatureExtractor(model, "avgpool")(IMAGES[:, :2])
    assert all(not module._forward_hooks for module in model.modules())


def test_a_training_step() -> None:
    student = FeatureExtractor(TorchvisionLike(), "avgpool")
    teacher = FeatureExtractor(TimmLike()).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loss = perception_coherence_loss(student(IMAGES), teacher(IMAGES))
    torch.autograd.backward(loss)
    assert student.model.stem[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    optimizer.step()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Linear(3, 4)
        self.unused = nn.Identity()
        self.recurrent = nn.GRU(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(self.blocks(x.flatten(2).transpose(1, 2)))[0]


def test_tokens_need_a_word() -> None:
    model = Tokens()
    with pytest.raises(ValueError, match=r'^pool: expected "flatten" or a callable .*\(5, 81, 4\)'):
        FeatureExtractor(model, "blocks")(IMAGES)
    found = FeatureExtractor(model, "blocks", pool=lambda t: t[:, 0])(IMAGES)
    assert found.shape == (5, 4)
    with pytest.raises(TypeError, match=r"^layer: expected a tensor from 'recurrent'.*got tuple"):
        FeatureExtractor(model, "recurrent")(IMAGES)
    assert FeatureExtractor(model, "recurrent", pool=lambda t: t[1][0])(IMAGES).shape == (5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "model: expected a module; got NoneType"),
        ((nn.Linear(3, 2),), "layer: expected the name of a submodule, because the model has no"),
        ((TorchvisionLike(), "pool"), "layer: expected the name of a submodule"),
        ((TorchvisionLike(), 3), "layer: expected the name of a submodule"),
        ((TorchvisionLike(), "fc", "max"), "pool: expected one of mean, flatten, or a callable"),
    ],
    ids=["model", "no layer", "unknown layer", "layer of another type", "pool"],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    model, layer, pool = (*arguments, None, "mean")[:3] if len(arguments) < 3 else arguments
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        FeatureExtractor(model, layer, pool=pool)


def test_layers_that_give_no_features() -> None:
    with pytest.raises(RuntimeError, match=r"^layer: expected the model to call 'unused'"):
        FeatureExtractor(Tokens(), "unused")(IMAGES)
    with pytest.raises(ValueError, match=r"^pool: expected features \[batch, width\] .*shape"):
        FeatureExtractor(TorchvisionLike(), "stem", pool=lambda t: t)(IMAGES)


@pytest.mark.vision
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm_itself(name: str) -> None:
    """What its own classifier would see."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=7).eval()
    images = torch.rand(2, 3, 224, 224)
    found = FeatureExtractor(model)(images)
    assert torch.equal(model.get_classifier()(found), model(images))


@pytest.mark.vision
@pytest.mark.parametrize(
    ("name", "layer", "pool"),
    [
        ("resnet18", "avgpool", "mean"),
        ("densenet121", "features", "mean"),  # whose next step is a ReLU in place
        ("mobilenet_v3_small", "classifier.0", "flatten"),  # and a Hardswish in place
        ("vit_b_16", "encoder.ln", lambda tokens: tokens[:, 0]),
    ],
)
def test_torchvision_itself(name: str, layer: str, pool: Any) -> None:
    """What torchvision's own extractor takes, pooled."""
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = models.get_model(name, num_classes=7).eval()
    images = torch.rand(2, 3, 224, 224)
    found = FeatureExtractor(model, layer, pool=pool)(images)
    output = extraction.create_feature_extractor(model, [layer])(images)[layer]
    pools = {"mean": lambda t: t.flatten(2).mean(2), "flatten": lambda t: t.flatten(1)}
    assert torch.equal(found, pools.get(pool, pool)(output))


@pytest.mark.vision
def test_torchvision_teaches_timm() -> None:
    """A step of distillation: the gradient is that of features taken by hand."""
    timm, models = pytest.importorskip("timm"), pytest.importorskip("torchvision.models")
    student = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
    teacher = models.resnet18().eval().requires_grad_(False)
    images = torch.rand(6, 3, 32, 32)
    weights = list(student.parameters())
    seen = models.resnet18()
    seen.load_state_dict(teacher.state_dict())
    seen.eval().fc = nn.Identity()
    ours = perception_coherence_loss(
        FeatureExtractor(student)(images), FeatureExtractor(teacher, "avgpool")(images)
    )
    plain = perception_coherence_loss(student(images), seen(images))
    assert torch.equal(ours, plain)
    for found, expected in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(plain, weights), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("dimensions", "pool"),
    [
        (2, "mean"),
        (2, "flatten"),
        (2, lambda t: t),
        (4, "mean"),
        (4, "flatten"),
        (4, lambda t: t[:, :, 0, 0]),
        (4, lambda t: t.square().flatten(1)),  # which needs the output in the backward pass
    ],
)
def test_what_comes_next_may_write_over_the_output(dimensions: int, pool: Any) -> None:
    """As VGG's and DenseNet's ReLU(inplace=True) do; gradients too."""
    first = nn.Linear(4, 3) if dimensions == 2 else nn.Conv2d(4, 3, 1)
    x = torch.randn(5, 4, *(2, 2)[: dimensions - 2])
    inplace = FeatureExtractor(nn.Sequential(first, nn.ReLU(inplace=True)), "0", pool=pool)(x)
    apart = FeatureExtractor(nn.Sequential(first, nn.ReLU()), "0", pool=pool)(x)
    assert torch.equal(inplace, apart)
    ours, theirs = (torch.autograd.grad(f.sin().sum(), first.weight)[0] for f in (inplace, apart))
    assert torch.equal(ours, theirs)


def test_a_tuple_that_is_written_over() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.two(x)
            return first.zero_() + second

    found = FeatureExtractor(Overwriting(), "two", pool=lambda pair: pair[0])(torch.ones(2, 3))
    assert torch.equal(found, torch.full((2, 3), 2.0))


def test_threads_get_their_own_features() -> None:
    """Both are inside the model when either's layer has been called."""
    together = threading.Barrier(2)

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            together.wait(timeout=30)
            return x

    extractor = FeatureExtractor(nn.Sequential(nn.Identity(), Waiting()), "0")
    inputs = [torch.full((2, 3), float(i)) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            found = list(pool.map(extractor, inputs))
            assert all(map(torch.equal, found, inputs))
    assert not extractor.model[0]._forward_hooks


@pytest.mark.parametrize("in_place", [False, True])
def test_of_a_compiled_model(in_place: bool) -> None:
    torch._dynamo.reset()
    model = TorchvisionLike()
    expected = FeatureExtractor(model, "stem.0")(IMAGES)
    if in_place:
        model.compile(backend="eager")
        extractor = FeatureExtractor(model, "stem.0")
    else:
        extractor = FeatureExtractor(torch.compile(model, backend="eager"), "_orig_mod.stem.0")
    for _ in range(2):
        torch.testing.assert_close(extractor(IMAGES), expected)
    torch._dynamo.reset()
    extractor.model(IMAGES)
    with pytest.raises(RuntimeError, match=r"it did not \(a compiled model that has run before"):
        extractor(IMAGES)


def test_the_last_call_of_a_layer_counts() -> None:
    """Also where what came before could not be pooled."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[None])[0] + self.layer(2 * x)

    x = torch.randn(3, 4)
    assert torch.equal(FeatureExtractor(Twice(), "layer")(x), 2 * x)


def test_compiled() -> None:
    torch._dynamo.reset()
    extractor = FeatureExtractor(TorchvisionLike(), "stem.0")
    compiled = torch.compile(extractor, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), extractor(IMAGES))
