"""The mean shift against the enumeration of all paths of a random tree."""

from itertools import product

import numpy as np
import pytest

from nabla_gfn_jax.algorithms.mean_shift import mean_shifts

DEPTH, BRANCHES, ELEMENTS = 4, 3, 2


class Tree:
    """Random transitions of a base model and a policy, and the weight and the sample at every leaf, in float64."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        self.paths = list(product(range(BRANCHES), repeat=DEPTH))
        self.base, self.policy = ({}, {})
        for depth in range(DEPTH):
            for node in product(range(BRANCHES), repeat=depth):
                self.base[node], self.policy[node] = random.dirichlet(np.full(BRANCHES, 3.0), 2)
        self.weight = {path: np.exp(random.normal()) for path in self.paths}
        self.sample = {path: random.normal(size=ELEMENTS) for path in self.paths}

    def probability(self, steps, path, start=0):
        return np.prod([steps[path[:k]][path[k]] for k in range(start, DEPTH)])

    def mean(self, node, of_leaf):
        """The base model's mean over the leaves below a node."""
        below = [path for path in self.paths if path[: len(node)] == node]
        return sum(self.probability(self.base, path, len(node)) * of_leaf(path) for path in below)

    def value(self, node):
        return np.log(self.mean(node, self.weight.get))

    def clean(self, node):
        return self.mean(node, self.sample.get)

    def shift(self, node):
        """The target's mean of the sample minus the base model's."""
        tilted = self.mean(node, lambda path: self.weight[path] * self.sample[path])
        return tilted / np.exp(self.value(node)) - self.clean(node)


@pytest.mark.parametrize("sampled_by", ["base", "policy"])
def test_the_mean_over_all_paths_is_the_shift(sampled_by):
    """At every inner node of the tree, and for paths of another policy, counted by their ratios."""
    tree = Tree(seed=3)
    steps = getattr(tree, sampled_by)
    nodes = [[path[:k] for k in range(DEPTH + 1)] for path in tree.paths]
    value = np.array([[tree.value(node) for node in path] for path in nodes])
    clean = np.array([[tree.clean(node) for node in path] for path in nodes])
    ratio = np.array(
        [
            [np.log(tree.probability(tree.base, path, k) / tree.probability(steps, path, k)) for k in range(DEPTH + 1)]
            for path in tree.paths
        ]
    )
    found = mean_shifts(value + 7.0, ratio, clean)
    assert found.shape == (len(tree.paths), DEPTH, ELEMENTS)
    for k in range(DEPTH):
        for node in product(range(BRANCHES), repeat=k):
            below = [i for i, path in enumerate(tree.paths) if path[:k] == node]
            share = np.array([tree.probability(steps, tree.paths[i], k) for i in below])
            np.testing.assert_allclose(share @ found[below, k], tree.shift(node), rtol=1e-10, atol=1e-12)


def test_it_is_calmer_than_the_plain_draw():
    """Both have the same mean at the root; the spread of the plain draw there is the larger one."""
    tree = Tree(seed=5)
    nodes = [[path[:k] for k in range(DEPTH + 1)] for path in tree.paths]
    value = np.array([[tree.value(node) for node in path] for path in nodes])
    clean = np.array([[tree.clean(node) for node in path] for path in nodes])
    share = np.array([tree.probability(tree.base, path) for path in tree.paths])
    ours = mean_shifts(value, np.zeros_like(value), clean)[:, 0]
    plain = np.expm1(value[:, -1] - value[:, 0])[:, None] * (clean[:, -1] - clean[:, 0])
    np.testing.assert_allclose(share @ ours, share @ plain, rtol=1e-10)
    spread = [share @ ((draw - tree.shift(())) ** 2).sum(axis=1) for draw in (ours, plain)]
    assert spread[0] < 0.7 * spread[1]
