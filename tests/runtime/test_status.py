"""What a learner answers to `lerobot-pi-rl-status`, and how it is shown."""

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lerobot_policy_pi_rl.runtime.access import Access
from lerobot_policy_pi_rl.runtime.client import LearnerClient, LearnerUnreachable, ask_status
from lerobot_policy_pi_rl.runtime.limits import Limits
from lerobot_policy_pi_rl.runtime.link import ActorRefused
from lerobot_policy_pi_rl.runtime.server import LearnerServer
from lerobot_policy_pi_rl.runtime.service import PIRLLearnerService
from lerobot_policy_pi_rl.scripts import status as command

pytestmark = pytest.mark.timeout(60)

REPORT = {
    "package": "0.1.0",
    "state": "training",
    "started_at": 1000.0,
    "progress": {
        "version": 120,
        "steps": 1000,
        "env_steps": 610_304,
        "online_steps": 1_000_000,
        "decisions": 122_880,
        "episodes": 5021,
        "env_steps_per_s": 2410.4,
    },
    "success": {"exploring": 0.83, "validation": 0.91, "best": 0.94, "best_version": 100},
    "staleness": {"mean": 0.4, "max": 1.0},
    "last_checkpoint": "outputs/run/checkpoints/000100",
    "sent": {"1": {"version": 119, "sent_at": 1890.0, "env_steps_per_s": 1204.0}},
    "actors_left": 2,
    "dropped": {"stale_decisions": 1024, "malformed_messages": 0},
}


@pytest.fixture
def serve() -> Iterator[Callable[..., LearnerServer]]:
    """Starts learner services on free ports of the loopback interface."""
    servers: list[LearnerServer] = []

    def start(report: dict[str, Any] | None = REPORT, access: Access | None = None) -> LearnerServer:
        service = PIRLLearnerService({"seed": 1}, 4, Limits(2**20, 8, 2**22, 200.0, 100))
        if report is not None:
            service.report(report)
        servers.append(LearnerServer(service, "127.0.0.1", 0, access))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_the_answer_has_the_report_and_what_the_service_knows(serve: Callable[..., LearnerServer]) -> None:
    server = serve()
    client = LearnerClient("127.0.0.1", server.port, 1, {"seed": 1})
    client.connect(10)
    try:
        client.send_decisions(b"not decoded by anybody")
        waiting = threading.Event()
        while not len(server.service.decisions):
            waiting.wait(0.02)
        answer = ask_status("127.0.0.1", server.port, Access())
    finally:
        client.close()
    assert answer["progress"] == REPORT["progress"]
    (actor,) = answer["actors"]
    assert (actor["actor"], actor["version"], actor["env_steps_per_s"]) == (1, 119, 1204.0)
    assert answer["max_actors"] == 4
    assert (answer["actors_joined"], answer["actors_reconnected"], answer["actors_replaced"]) == (1, 0, 0)
    assert answer["waiting"] == {"decisions": 1, "interactions": 0}
    assert "sent" not in answer


def test_who_asks_takes_no_place_and_is_not_listed(serve: Callable[..., LearnerServer]) -> None:
    server = serve()
    for _ in range(10):
        assert ask_status("127.0.0.1", server.port, Access())["actors"] == []
    assert server.service.actors.connected() == []
    assert server.service.actors.next_event() is None


def test_nobody_there_is_one_line(free_port: int) -> None:
    with pytest.raises(LearnerUnreachable, match=rf"no learner answers at 127.0.0.1:{free_port}") as error:
        ask_status("127.0.0.1", free_port, Access(), timeout_s=2)
    assert "\n" not in str(error.value)


def test_a_learner_that_is_still_starting_says_so(serve: Callable[..., LearnerServer]) -> None:
    with pytest.raises(ActorRefused, match="still starting"):
        ask_status("127.0.0.1", serve(report=None).port, Access())


def test_the_token_is_asked_for(serve: Callable[..., LearnerServer]) -> None:
    server = serve(access=Access("a" * 20))
    with pytest.raises(ActorRefused, match="refuses: unauthenticated") as error:
        ask_status("127.0.0.1", server.port, Access())
    assert "\n" not in str(error.value)
    assert ask_status("127.0.0.1", server.port, Access("a" * 20))["state"] == "training"


def test_one_screen_says_everything() -> None:
    actor = {"actor": 1, "peer": "ipv4:10.0.0.2:4431", "joined_at": 1100.0}
    shown = command.describe(
        REPORT
        | {
            "actors": [
                actor | REPORT["sent"]["1"],
                actor | {"actor": 2, "version": None, "sent_at": None, "env_steps_per_s": 0.0},
            ],
            "max_actors": 32,
            "actors_joined": 5,
            "actors_reconnected": 2,
            "actors_replaced": 1,
            "waiting": {"decisions": 3, "interactions": 0},
            "refused": {"no token": 2},
            "now": 1900.0,
        }
    )
    assert len(shown.splitlines()) <= 24
    for part in (
        "training, version 120 of 1,000, up 15 min 0 s",
        "610,304 of 1,000,000 (2,410/s)",
        "122,880 decisions, 5,021 episodes",
        "exploring 0.83, validation 0.91, best 0.94 (version 100)",
        "mean 0.4, oldest 1 versions",
        "outputs/run/checkpoints/000100",
        "2 of at most 32; since the start 5 joined (2 again, 1 in place of a silent one), 2 left",
        "ipv4:10.0.0.2:4431, joined 13 min 20 s ago, last sent 10 s ago with version 119, 1,204 steps/s",
        "nothing sent yet",
        "decisions 3, interactions 0",
        "dropped            stale_decisions 1,024",
        "refused            no token 2",
    ):
        assert part in shown, part


def test_programs_get_json(serve: Callable[..., LearnerServer]) -> None:
    answer = json.loads(command.status([f"--learner=127.0.0.1:{serve().port}", "--json"]))
    assert answer["success"] == REPORT["success"]
