"""Zachary's karate club: who was friends with whom, and with whom each went when it split in two.

Source: Zachary 1977, by way of networkx.
"""

import torch

from datamodules.graphs import GraphDataModule
from runner.errors import InputError


class KarateClub(GraphDataModule):
    """34 members of a karate club, who was friends with whom, and with whom each went when it split in two (Zachary 1977).

    There is nothing else to know of a member: feature i is 1 for member i, and 0 for all others. It comes with networkx
    (whose weights, in how many places two friends met, are left out), and has no validation set.

    Args:
        labelled: the members that are trained on; all others test. 0 is the instructor and 33 the officer who fell out.
        data: arguments of `GraphDataModule`.
    """

    classes = ("Mr. Hi", "Officer")

    def __init__(self, labelled: tuple[int, ...] = (0, 33), **data):
        super().__init__(**data)
        self.labelled = labelled

    def setup(self, stage: str | None = None) -> None:
        """Read the graph.

        Raises:
            InputError: not each of the two has a labelled member, or there is no such member.
        """
        if self.train_set is not None:
            return
        import networkx

        club = networkx.karate_club_graph()
        labels = torch.tensor([self.classes.index(club.nodes[i]["club"]) for i in range(len(club))])  # (34,)
        train = torch.tensor(sorted(set(self.labelled)), dtype=torch.int64)
        if len(train) and not 0 <= train.min() <= train.max() < len(club):
            raise InputError(f"labelled: members are 0 to {len(club) - 1}, got {list(self.labelled)}")
        if len(labels[train].unique()) < len(self.classes):
            raise InputError(f"labelled: at least one member of each side, such as 0 and 33, got {list(self.labelled)}")
        if len(train) == len(club):
            raise InputError("labelled: all members: that leaves none to test")
        test = torch.tensor([i for i in range(len(club)) if i not in self.labelled])
        edges = torch.tensor(sorted(club.to_directed().edges)).t().contiguous()  # (2, E): both ways
        self.keep(torch.eye(len(club)), edges, labels, {"train": train, "test": test})
        self.source = "Zachary's karate club, of the package networkx"
