"""Tools for research on routing: let another strategy choose the experts, and record the routers' decisions.

from transformers_moe_offload import routing

with routing.set_routing(model, "random", seed=1):
    model(**inputs)
"""

from transformers_moe_offload.routing import strategies
from transformers_moe_offload.routing.calibration import RouterCalibration, calibration
from transformers_moe_offload.routing.choice import Choice, RouterCall
from transformers_moe_offload.routing.contrast import ExpertContrast, ExpertDifference
from transformers_moe_offload.routing.meter import Tradeoff, tradeoff
from transformers_moe_offload.routing.order import reuse_order, token_order
from transformers_moe_offload.routing.recorder import RoutingRecorder, record_routing
from transformers_moe_offload.routing.rollouts import RolloutReplay
from transformers_moe_offload.routing.strategies.clusters import fit_centroids
from transformers_moe_offload.routing.strategy import RoutingStrategy, register_strategy, strategy_names
from transformers_moe_offload.routing.switching import RoutingChange, reset, set_routing
from transformers_moe_offload.routing.trace import RoutingTrace
from transformers_moe_offload.routing.uncertainty import RoutingUncertainty, routing_uncertainty

__all__ = [
    "Choice",
    "ExpertContrast",
    "ExpertDifference",
    "RolloutReplay",
    "RouterCalibration",
    "RouterCall",
    "RoutingChange",
    "RoutingRecorder",
    "RoutingStrategy",
    "RoutingTrace",
    "RoutingUncertainty",
    "Tradeoff",
    "calibration",
    "fit_centroids",
    "record_routing",
    "register_strategy",
    "reset",
    "reuse_order",
    "routing_uncertainty",
    "set_routing",
    "strategies",
    "strategy_names",
    "token_order",
    "tradeoff",
]
