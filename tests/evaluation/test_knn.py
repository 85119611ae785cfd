"""kNN and probe against plain loops, and on features whose answer is known."""

import math

import numpy as np
import pytest
import torch

from relicctl.evaluation.knn import compute_knn_accuracy, iter_knn_votes
from relicctl.evaluation.linear import compute_probe_accuracy


def literal_knn(bank, bank_labels, queries, labels, k, temperature=0.07):
    right = 0
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        scored = []
        for row, row_label in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            scored.append((dot / math.dist(query, [0] * len(query)) / math.dist(row, [0] * len(row)), row_label))
        votes: dict[int, float] = {}
        for similarity, row_label in sorted(scored, reverse=True)[:k]:
            votes[row_label] = votes.get(row_label, 0) + math.exp(similarity / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(labels)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_a_literal_loop(k):
    generator = torch.Generator().manual_seed(k)
    bank, queries = torch.randn(60, 8, generator=generator), torch.randn(40, 8, generator=generator)
    bank_labels = torch.randint(0, 4, (60,), generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    measured = compute_knn_accuracy(bank, bank_labels, queries, labels, ks=(k,))[k]
    assert measured == pytest.approx(literal_knn(bank, bank_labels, queries, labels, k))
    assert 0 < measured < 1


def test_of_several_classes_each_is_ranked_by_the_mean_of_the_neighbours_that_count():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 8, generator=generator), torch.randn(40, 8, generator=generator)
    labels = torch.randint(-1, 2, (60, 3), generator=generator).to(torch.int8)
    found = torch.cat([votes[7] for _, votes in iter_knn_votes(bank, labels, queries, 3, ks=(7, 100))])
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=-1)
    for q in range(40):
        nearest = similarity[q].topk(7)
        weights = torch.exp(nearest.values / 0.07)
        wanted = sum(w * labels[i].float() for w, i in zip(weights, nearest.indices, strict=True)) / weights.sum()
        torch.testing.assert_close(found[q], wanted, rtol=1e-4, atol=1e-5)


def test_k_may_exceed_the_bank():
    bank = torch.eye(3)
    labels = torch.arange(3)
    assert compute_knn_accuracy(bank, labels, bank, labels, ks=(2, 200)) == {2: 1.0, 200: 1.0}


def test_probe_finds_a_linear_rule_and_no_rule_in_noise():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 10, generator=generator)
    labels = (features @ torch.randn(10, 3, generator=generator)).argmax(1)
    noise = labels[torch.randperm(600, generator=generator)]
    assert compute_probe_accuracy(features[:400], labels[:400], features[400:], labels[400:]) > 0.93
    chance = float(np.bincount(noise[400:]).max()) / 200
    assert compute_probe_accuracy(features[:400], noise[:400], features[400:], noise[400:]) < chance + 0.1


def test_probe_sends_no_gradient_into_the_features():
    features = torch.randn(20, 4, requires_grad=True)
    labels = torch.arange(20) % 2
    compute_probe_accuracy(features, labels, features, labels)
    assert features.grad is None
