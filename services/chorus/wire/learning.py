"""What was learnt of models and strategies, as messages."""

from __future__ import annotations

from chorus.api.coordinator.v1 import learning_pb2 as pb
from chorus.core.ensemble.learning import Learner
from chorus.wire.ensemble import STRATEGY_VALUES


def encode_learning(learner: Learner) -> pb.GetLearningResponse:
    """All of it."""
    return pb.GetLearningResponse(
        mode=learner.mode,
        frozen=learner.bandit.frozen,
        earned=[
            pb.EarnedReward(
                context=context,
                strategy=STRATEGY_VALUES[way.strategy],
                model=way.model,
                count=earned.count,
                mean_reward=earned.mean,
            )
            for context, ways in learner.bandit.table().items()
            for way, earned in ways.items()
        ],
    )
