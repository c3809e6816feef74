"""The one hook into LeRobot: its algorithm factory knows its own algorithms by name, in code."""

from functools import wraps

from lerobot.rl.algorithms import factory
from lerobot.rl.algorithms.base import RLAlgorithm


def install() -> None:
    """Lets LeRobot's `get_algorithm_class` answer for `pi_rl`; every other name goes to LeRobot's own function.

    LeRobot looks the function up in its module whenever it makes an algorithm, so this is enough, and calling it
    again changes nothing.
    """
    stock = factory.get_algorithm_class
    if getattr(stock, "knows_pi_rl", False):
        return

    @wraps(stock)
    def get_algorithm_class(name: str) -> type[RLAlgorithm]:
        if name != "pi_rl":
            return stock(name)
        from .pi_rl import PIRLAlgorithm

        return PIRLAlgorithm

    get_algorithm_class.knows_pi_rl = True  # type: ignore[attr-defined]
    factory.get_algorithm_class = get_algorithm_class
