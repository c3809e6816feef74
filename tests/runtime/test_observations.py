"""The path of an observation from the environment to the policy, over the wire."""

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import preprocess_observation
from lerobot.envs.configs import AlohaEnv

from lerobot_policy_pi_rl.errors import ConfigError
from lerobot_policy_pi_rl.runtime.observations import ObservationPath

TOP, STATE = "observation.images.top", "observation.state"
FEATURES = {
    TOP: PolicyFeature(FeatureType.VISUAL, (3, 16, 32)),
    STATE: PolicyFeature(FeatureType.STATE, (4,)),
}


@pytest.fixture
def path() -> ObservationPath:
    return ObservationPath(FEATURES, AlohaEnv(observation_height=16, observation_width=32), None)


def raw(rows: int = 2) -> dict[str, np.ndarray]:
    """Observations as `ChunkedVectorEnv` gives them; the pictures have every value that a byte has."""
    values = np.arange(rows * 16 * 32 * 3) % 256
    rng = np.random.default_rng(0)
    return {
        "pixels/top": rng.permutation(values).astype(np.uint8).reshape(rows, 16, 32, 3),
        "agent_pos": rng.normal(size=(rows, 4)),
    }


def test_it_is_the_path_of_lerobots_evaluation(path: ObservationPath) -> None:
    flat = raw()
    expected = preprocess_observation({"pixels": {"top": flat["pixels/top"]}, "agent_pos": flat["agent_pos"]})
    found = path.from_environment(flat, ["a", "b"])
    assert found.keys() == FEATURES.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key])


def test_the_wire_changes_no_bit(path: ObservationPath) -> None:
    there = path.from_environment(raw(), ["a", "b"])
    packed = path.pack(there)
    for key, entry in path.wire_fields().items():
        assert packed[key].dtype == entry.dtype
        assert tuple(packed[key].shape[1:]) == entry.shape
    assert len(packed[TOP].unique()) == 256
    here = path.unpack(packed)
    for key, value in there.items():
        assert torch.equal(here[key], value)
        assert here[key].dtype == value.dtype


def test_a_picture_crosses_as_bytes(path: ObservationPath) -> None:
    packed = path.pack(path.from_environment(raw(), ["a", "b"]))
    assert torch.equal(packed[TOP], torch.from_numpy(raw()["pixels/top"]).permute(0, 3, 1, 2))


def test_pictures_cross_in_the_environment_s_size_whatever_the_policy_was_trained_with() -> None:
    features = {TOP: PolicyFeature(FeatureType.VISUAL, (3, 224, 224))}
    path = ObservationPath(features, AlohaEnv(observation_height=16, observation_width=32), None)
    packed = path.pack(path.from_environment(raw(), ["a", "b"]))
    assert tuple(packed[TOP].shape[1:]) == path.wire_fields()[TOP].shape == (3, 16, 32)


def test_what_the_environment_calls_otherwise_gets_the_policy_s_name() -> None:
    features = {"observation.images.base": FEATURES[TOP], STATE: FEATURES[STATE]}
    renamed = {TOP: "observation.images.base"}
    path = ObservationPath(features, AlohaEnv(observation_height=16, observation_width=32), None, renamed)
    assert path.from_environment(raw(), ["a", "b"]).keys() == features.keys()
    assert path.wire_fields()["observation.images.base"].shape == (3, 16, 32)


def test_what_the_policy_does_not_read_is_left_out(path: ObservationPath) -> None:
    found = path.from_environment({**raw(), "environment_state": np.zeros((2, 7))}, ["a", "b"])
    assert found.keys() == FEATURES.keys()


def test_a_picture_of_another_size_than_stated_is_refused() -> None:
    path = ObservationPath(FEATURES, AlohaEnv(observation_height=32, observation_width=32), None)
    with pytest.raises(
        ConfigError, match=r"says .*top' is \(3, 32, 32\), but .* gives \(3, 16, 32\)"
    ) as error:
        path.from_environment(raw(), ["a", "b"])
    assert "\n" not in str(error.value)


def test_a_missing_feature_is_named(path: ObservationPath) -> None:
    with pytest.raises(
        ConfigError, match=r"gives \['observation.state'\], but not \['observation.images.top'\]"
    ):
        path.from_environment({"agent_pos": np.zeros((2, 4))}, ["a", "b"])


PICTURE = np.zeros((2, 16, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pixels/top": PICTURE / 255}, r"`env.type`: .*'pixels/top' as float64 of shape \(16, 32, 3\)"),
        ({"pixels/top": PICTURE.transpose(0, 3, 1, 2)}, r"`env.type`: .*as uint8 of shape \(3, 16, 32\)"),
        ({"pixels/top": PICTURE[..., 0]}, r"`env.type`: .*as uint8 of shape \(16, 32\)"),
        ({"agent_pos": np.zeros((2, 5))}, r"`env.features`: says .*state' is \(4,\), .* gives \(5,\)"),
        ({"agent_pos": np.zeros((2, 2, 2))}, r"`env.features`: says .*state' is \(4,\), .* gives \(2, 2\)"),
        ({"agent_pos": np.array(["up", "down"])}, r"`env.features`: .*but not \['observation.state'\]"),
    ],
)
def test_what_lerobot_cannot_read_is_one_line(
    path: ObservationPath, given: dict[str, np.ndarray], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        path.from_environment({**raw(), **given}, ["a", "b"])
    assert "\n" not in str(error.value)


def test_text_that_the_policy_does_not_read_is_left_out(path: ObservationPath) -> None:
    """As in LeRobot's evaluation; an environment's task text comes from elsewhere."""
    for text in (np.array(["pick", "place it"]), np.array(["pick", None], dtype=object)):
        found = path.from_environment({**raw(), "instruction": text}, ["a", "b"])
        assert found.keys() == FEATURES.keys()


def test_one_number_of_each_environment_is_a_row() -> None:
    features = {STATE: PolicyFeature(FeatureType.STATE, (1,))}
    path = ObservationPath(features, AlohaEnv(observation_height=16, observation_width=32), None)
    found = path.from_environment({"agent_pos": np.array([3.0, 4.0, 5.0])}, ["a"] * 3)
    assert found[STATE].tolist() == [[3], [4], [5]]
