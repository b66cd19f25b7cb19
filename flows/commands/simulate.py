"""`stackrlhf simulate`: a dump whose truth is known."""

import argparse

from flows.commands import DONE
from tasks.ingest.config import SimulatedSiteConfig


def simulate(arguments: argparse.Namespace) -> int:
    from tasks.ingest.simulated.generate import write_site

    if (arguments.folder / "Posts.xml").exists():
        raise ValueError(f"{arguments.folder / 'Posts.xml'} is there already: give another folder")
    write_site(
        SimulatedSiteConfig(questions=arguments.questions, seed=arguments.seed, oddities=arguments.oddities), arguments.folder
    )
    print(f"{arguments.folder}: {arguments.questions} questions; read it with stackrlhf run --dump {arguments.folder}")
    return DONE
