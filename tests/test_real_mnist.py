"""One epoch on the real MNIST, where there is one."""

import pytest
from conftest import REAL_DATA_DIR, has_real_mnist
from test_train import receipt


@pytest.mark.skipif(not has_real_mnist(), reason="DATA_DIR does not name a folder with the real MNIST")
def test_one_epoch_of_the_mlp_reaches_95_percent(train, monkeypatch):
    monkeypatch.setenv("DATA_DIR", REAL_DATA_DIR)
    said = receipt(train("--trainer.max_epochs=1", tiny=()))
    assert (said["data"]["train"], said["data"]["val"], said["tested"]) == (55000, 5000, 10000)
    assert said["metrics"]["test/acc"] > 0.95
