"""How the simulated site votes: from the true reward, the time an answer has been seen, and luck.

    up   ~ Poisson(visitors * exposure * exp(SLOPE * (true_reward - 1)))
    down ~ Poisson(visitors * exposure * DISLIKE * (1 - true_reward))

Visitors differ between questions, exposure falls with an answer's place in time; both are the same for every text, so
votes depend on the text through true_reward alone. The asker accepts one answer at times, rather a good one.
"""

import math
import random

SLOPE, DISLIKE, ACCEPTS, ACCEPT_SLOPE = 3.0, 0.12, 0.6, 5.0
VISITORS = (20.0, 40.0, 80.0)
EXPOSURE = (1.0, 0.85, 0.75, 0.65, 0.6)


def poisson(rate: float, rng: random.Random) -> int:
    """A Poisson draw by Knuth's product of uniforms, in pieces so that a large rate cannot underflow."""
    count = 0
    while rate > 0:
        piece = min(rate, 30.0)
        rate -= piece
        limit, product = math.exp(-piece), rng.random()
        while product > limit:
            count += 1
            product *= rng.random()
    return count


def cast_votes(rewards: list[float], rng: random.Random) -> tuple[list[int], int | None]:
    """Votes of a question's answers, given in the order they were written, and the index of the accepted one, if any."""
    visitors = rng.choice(VISITORS)
    votes = []
    for reward, exposure in zip(rewards, EXPOSURE, strict=False):
        up = poisson(visitors * exposure * math.exp(SLOPE * (reward - 1)), rng)
        down = poisson(visitors * exposure * DISLIKE * (1 - reward), rng)
        votes.append(up - down)
    if rng.random() > ACCEPTS:
        return votes, None
    weights = [math.exp(ACCEPT_SLOPE * reward) for reward in rewards]
    return votes, rng.choices(range(len(rewards)), weights)[0]
