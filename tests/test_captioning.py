"""Show, attend and tell: reads maps as a sequence, tells what it looked at, and learns."""

from types import SimpleNamespace

import pytest
import torch
from test_train import receipt

from callbacks.translations import CaptionPictures
from datamodules.captions import Captions
from lit_models.backbones import Backbone, SmallFeatures
from lit_models.captioning import ShowAttendTell
from runner.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Attribute 'backbone'")  # a Trainer's: train.py is quiet about it


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def model_of(**arguments) -> ShowAttendTell:
    backbone = Backbone(SmallFeatures((16, 16, 24)), ["stage3"])
    return ShowAttendTell(
        **{"targets": 19, "backbone": backbone, "width": 16, "hidden": 24, "max_length": 12} | arguments
    )


def batch_of(n: int = 8, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    data = Captions(train_size=n, val_size=1, test_size=1, **arguments)
    data.setup()
    images, sentences = data.train_set.__getitems__(list(range(n)))
    return images.float() / 127.5 - 1, sentences


@pytest.mark.parametrize("attention", ["additive", "dot", "general"])
def test_weights_are_of_the_grids_places(attention):
    model = model_of(attention=attention).eval()
    images, sentences = batch_of()
    assert model(images, sentences[:, :-1]).shape == (8, sentences.shape[1] - 1, 19)
    tokens, looks = model.translate(images)
    assert looks.shape == (8, tokens.shape[1], 64)  # 8 x 8, of 64 x 64 pixels
    torch.testing.assert_close(looks.sum(dim=2), torch.ones(looks.shape[:2]))


def test_the_memory_is_the_maps_row_by_row():
    model = model_of().eval()
    images, _ = batch_of(2)
    maps = model.backbone(images)[0]  # (2, 24, 8, 8)
    state = model.read(images)
    for row in range(8):
        for column in range(8):
            assert torch.equal(state.memory[:, 8 * row + column], maps[:, :, row, column])


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 48, 80)])
def test_one_picture_and_pictures_of_another_shape(shape):
    model = model_of().eval()
    tokens, looks = model.translate(torch.randn(shape))
    assert looks.shape[::2] == (shape[0], -(-shape[2] // 8) * -(-shape[3] // 8))
    assert tokens.shape[1] <= 12


def test_a_training_batch_of_one():
    model = model_of()
    images, sentences = batch_of(1)
    _, loss = model._teach(images, sentences)
    loss.backward()
    assert loss.isfinite()


def test_a_batch_is_learned_by_heart_and_what_it_looked_at_matters():
    model = model_of()
    images, sentences = batch_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(300):
        sums, loss = model._teach(images, sentences)
        optimizer.zero_grad()
        (loss / sums["count"]).backward()
        optimizer.step()
        if step % 10 == 0 and float((loss / sums["count"]).detach()) < 0.02:
            break
    model.eval()
    for norm in [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
        norm.train()  # the batch's own statistics, by which it was learned
    tokens, _ = model.translate(images)
    assert model.is_exact(tokens, sentences).all()
    assert not model.is_exact(model.translate(images.flip(0))[0], sentences).any()  # it is about the pictures


def test_dot_needs_as_many_maps_as_units():
    with pytest.raises(InputError, match="dot needs queries as wide as the memory, got 16 and 24"):
        model_of(attention="dot", hidden=16)


@pytest.mark.pictures
def test_a_panel_for_each_word(tmp_path):
    saved = {}
    data = Captions(train_size=1, val_size=1, test_size=4)
    data.setup()
    images, sentences = data.test_set.__getitems__([0, 1, 2, 3])
    tokens = sentences[:, 1:].clone()
    tokens[0, 0] = data.target_vocabulary.end  # wrong: nothing is said
    weights = torch.zeros(4, tokens.shape[1], 64)
    weights[:, :, 9] = 1
    pictures = CaptionPictures(SimpleNamespace(save_picture=lambda name, figure: saved.update({name: figure})))
    pictures.on_test_start(None, None)
    pictures.on_test_batch_end(None, ShowAttendTell, (tokens, weights), (images.float() / 127.5 - 1, sentences), 0)
    pictures.on_test_end(SimpleNamespace(datamodule=data), None)
    figure = saved["captions"]
    assert figure.get_suptitle().startswith("1 of 4 test samples wrong")
    n = len(figure.axes) // 4  # a picture, and a panel for each word of the longest sentence
    others = [axis for i, axis in enumerate(figure.axes) if i % n]
    titles, written = ([t.get_text() for axis in axes for t in axis.texts] for axes in (figure.axes[::n], others))
    words = [data.target_vocabulary.decode(s).split() for s in sentences[1:]]
    assert written == ["END", *(word for sentence in words for word in [*sentence, "END"])]
    assert titles[0] == f"nothing ({data.target_vocabulary.decode(sentences[0])})"
    assert titles[1:] == [" ".join(sentence) for sentence in words]
    figure.savefig(tmp_path / "a.png")


def test_through_train_py(train):
    run = train("--data.train_size=12", "--data.val_size=3", "--data.test_size=5", "--data.batch_size=4",
                "--trainer.max_epochs=1", experiment="experiments/shapes_captioning.yaml", tiny=())  # fmt: skip
    said = receipt(run)
    assert set(said["metrics"]) == {"test/loss", "test/acc", "test/exact"}
    assert said["tested"] == 5
