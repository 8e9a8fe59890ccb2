"""Where training settings come from, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from backcast.errors import ConfigError
from trainer.config import PRESETS, RECIPES, Protocol, TrainConfig


def write(folder: Path, content: str) -> Path:
    file = folder / "train.toml"
    file.write_text(content, encoding="utf-8")
    return file


def test_paper_is_the_published_schedule() -> None:
    paper = TrainConfig.load("paper", recipe="published")
    assert [paper.width(k) for k in range(5)] == [256, 320, 384, 448, 512]
    assert [paper.depth(k) for k in range(5)] == [2, 2, 3, 3, 3]
    assert (paper.epochs, paper.batch_size, paper.learning_rate) == (500, 2048, 0.001)
    assert not paper.averaging
    assert (paper.weight_decay, paper.alignment_weight) == (0.01, None)
    assert (paper.evaluate_every, paper.first_selected_epoch) == (10, 50)
    assert paper.min_value_count == 5


def test_small_and_fast_are_the_default_and_leak_free() -> None:
    assert TrainConfig.load() == TrainConfig.load("small", recipe="fast") == TrainConfig()
    assert TrainConfig().protocol is Protocol.STRICT
    assert (TrainConfig().averaging, TrainConfig().epochs) == (True, 20)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_by_every_recipe(preset: str, recipe: str) -> None:
    config = TrainConfig.load(preset, recipe=recipe)
    named = {**PRESETS[preset], **RECIPES[recipe][preset]}
    others = set(TrainConfig.model_fields) - set(named)
    assert {key: getattr(config, key) for key in named} == named
    assert config.model_dump(include=others) == TrainConfig().model_dump(include=others)


@pytest.mark.parametrize("preset", PRESETS)
def test_recipes_differ_in_how_long_and_how_fast_alone(preset: str) -> None:
    fast, published = (TrainConfig.load(preset, recipe=name) for name in ("fast", "published"))
    pace = {
        *("epochs", "batch_size", "learning_rate", "evaluate_every"),
        *("adam_beta2", "averaging", "unit_scores"),
    }
    assert fast.model_dump(exclude=pace) == published.model_dump(exclude=pace)
    assert (fast.averaging, published.averaging) == (True, False)
    assert fast.epochs < published.epochs
    for recipe in RECIPES.values():
        assert set(recipe) == set(PRESETS)
        assert set(recipe[preset]) == pace


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Preset 'large' is unknown; there are small, paper\."):
        TrainConfig.load("large")


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Recipe 'slow' is unknown; there are fast, published\."):
        TrainConfig.load(recipe="slow")


@pytest.mark.parametrize(
    ("k", "width", "depth"), [(0, 8, 1), (1, 10, 2), (2, 12, 2), (3, 12, 2), (99, 12, 2)]
)
def test_the_last_entry_of_a_schedule_repeats(k: int, width: int, depth: int) -> None:
    config = TrainConfig(widths=(8, 10, 12), layers=(1, 2))
    assert (config.width(k), config.depth(k)) == (width, depth)


def test_overrides_go_before_the_file_and_the_file_before_preset_and_recipe(tmp_path: Path) -> None:
    file = write(tmp_path, 'epochs = 7\nbatch_size = 99\nprotocol = "paper"\n')
    config = TrainConfig.load("paper", file, recipe="published", batch_size=5, seed=None)
    assert (config.batch_size, config.epochs, config.seed) == (5, 7, 0)
    assert (config.learning_rate, config.averaging) == (0.001, False)
    assert config.protocol is Protocol.PAPER
    assert config.widths == (256, 320, 384, 448, 512)


def test_a_file_may_set_everything(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        widths = [4, 6]           # café
        layers = [1]
        epochs = 3
        batch_size = 10
        learning_rate = 0.5
        adam_beta2 = 0.9
        averaging = false
        unit_scores = false
        weight_decay = 0
        alignment_weight = 0.0
        protocol = "strict"
        evaluate_every = 2
        first_selected_epoch = 1
        patience = 4
        min_value_count = 1
        seed = 9
        device = "cpu"
        """,
    )
    config = TrainConfig.load("small", file)
    assert config.model_dump(mode="json") == {
        "widths": [4, 6],
        "layers": [1],
        "epochs": 3,
        "batch_size": 10,
        "learning_rate": 0.5,
        "adam_beta2": 0.9,
        "averaging": False,
        "unit_scores": False,
        "weight_decay": 0.0,
        "alignment_weight": 0.0,
        "protocol": "strict",
        "evaluate_every": 2,
        "first_selected_epoch": 1,
        "patience": 4,
        "min_value_count": 1,
        "seed": 9,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "Training setting epoch: Extra inputs are not permitted"),
        ('epochs = "many"', "Training setting epochs: Input should be a valid integer"),
        ("epochs = 2.5", "Training setting epochs: Input should be a valid integer"),
        ("epochs = 0", "Training setting epochs: Input should be greater than 0"),
        ("widths = []", "Training setting widths: Tuple should have at least 1 item"),
        ("widths = [8, 0]", r"Training setting widths\.1: Input should be greater than 0"),
        ("widths = 8", "Training setting widths: Input should be a valid tuple"),
        ("learning_rate = 0", "Training setting learning_rate: Input should be greater than 0"),
        ("alignment_weight = -1", "Training setting alignment_weight: Input should be greater"),
        ("seed = -1", "Training setting seed: Input should be greater than or equal to 0"),
        ('protocol = "lenient"', "Training setting protocol: Input should be 'strict' or 'paper'"),
        ('averaging = "much"', "Training setting averaging: Input should be a valid boolean"),
        ('device = "tpu"', "Training setting device: Input should be 'auto', 'cpu' or 'cuda'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        TrainConfig.load("small", write(tmp_path, content))
    assert "The settings are widths, layers, epochs," in raised.value.message


@pytest.mark.parametrize(
    ("overrides", "name"),
    [({"epochs": 0}, "epochs"), ({"protocol": "lenient"}, "protocol"), ({"device": "x"}, "device")],
)
def test_a_wrong_override_is_named(overrides: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"Training setting {name}:"):
        TrainConfig.load(**overrides)


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.toml cannot be read as TOML"):
        TrainConfig.load("small", write(tmp_path, "epochs: 3"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_bytes(b"epochs = 3 # \xff")
    with pytest.raises(ConfigError, match=r"train\.toml cannot be read as TOML"):
        TrainConfig.load("small", tmp_path / "train.toml")


@pytest.mark.parametrize("name", ["absent.toml", "."], ids=["absent", "folder"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    said = rf"{name} cannot be read: (No such file or directory|Is a directory)\.$"
    with pytest.raises(ConfigError, match=said):
        TrainConfig.load("small", tmp_path / name)
