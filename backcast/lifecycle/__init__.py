"""A version's life: registered, published, promoted, superseded, gone.

Order is what makes a kill harmless: files first, made durable under a name of their own, then one
transaction. A kill before the transaction leaves litter and the old state; after it, the new state.
"""

from backcast.lifecycle.changing import erase, upsert, upsert_batches
from backcast.lifecycle.collecting import (
    Collector,
    Doomed,
    Policy,
    collect,
    collect_litter,
    plan_collection,
    plan_litter,
    sweep,
)
from backcast.lifecycle.comparing import Compared
from backcast.lifecycle.exporting import Exported, count_exported, export
from backcast.lifecycle.gates import Gate, Thresholds
from backcast.lifecycle.history import deployment_diff
from backcast.lifecycle.loading import load_snapshot
from backcast.lifecycle.operations import run_order
from backcast.lifecycle.orders import Order, Promote, Refresh, Rollback
from backcast.lifecycle.places import Backcast, Report, open_backcast
from backcast.lifecycle.promotion import (
    Candidate,
    Expected,
    Plan,
    Promoted,
    compare_with_live,
    find_candidate,
    plan_promotion,
    promote,
)
from backcast.lifecycle.refreshing import compact, refresh
from backcast.lifecycle.registering import Base, publish, register_version
from backcast.lifecycle.remains import ErasureReport, Holder
from backcast.lifecycle.retiring import deprecate, retire, withdraw_deprecation
from backcast.lifecycle.rollback import RollbackPlan, plan_rollback, rollback

__all__ = [
    "Backcast",
    "Base",
    "Candidate",
    "Collector",
    "Compared",
    "Doomed",
    "ErasureReport",
    "Expected",
    "Exported",
    "Gate",
    "Holder",
    "Order",
    "Plan",
    "Policy",
    "Promote",
    "Promoted",
    "Refresh",
    "Report",
    "Rollback",
    "RollbackPlan",
    "Thresholds",
    "collect",
    "collect_litter",
    "compact",
    "compare_with_live",
    "count_exported",
    "deployment_diff",
    "deprecate",
    "erase",
    "export",
    "find_candidate",
    "load_snapshot",
    "open_backcast",
    "plan_collection",
    "plan_litter",
    "plan_promotion",
    "plan_rollback",
    "promote",
    "publish",
    "refresh",
    "register_version",
    "retire",
    "rollback",
    "run_order",
    "sweep",
    "upsert",
    "upsert_batches",
    "withdraw_deprecation",
]
