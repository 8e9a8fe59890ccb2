"""A version's life: registered, published, promoted, superseded, gone.

Order is what makes a kill harmless: files first, made durable under a name of their own, then one
transaction. A kill before the transaction leaves litter and the old state; after it, the new state.
"""

from backcast.lifecycle.backups import (
    Copied,
    back_up,
    faults_of_backup,
    open_backup,
    restore,
)
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
from backcast.lifecycle.erasing import Listed, erase_listed
from backcast.lifecycle.exporting import Exported, count_exported, export
from backcast.lifecycle.gates import Gate, Thresholds
from backcast.lifecycle.history import deployment_diff
from backcast.lifecycle.loading import load_snapshot
from backcast.lifecycle.moving import move
from backcast.lifecycle.operations import run_order
from backcast.lifecycle.orders import Order, Promote, Refresh, Rollback
from backcast.lifecycle.places import Backcast, Report, open_backcast, open_new
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
from backcast.lifecycle.registering import (
    Base,
    demand_promotable,
    publish,
    register_version,
)
from backcast.lifecycle.remains import ErasureReport, Holder, served_as
from backcast.lifecycle.retiring import deprecate, retire, withdraw_deprecation
from backcast.lifecycle.rollback import RollbackPlan, plan_rollback, rollback
from backcast.lifecycle.verifying import Verified, verify

__all__ = [
    "Backcast",
    "Base",
    "Candidate",
    "Collector",
    "Compared",
    "Copied",
    "Doomed",
    "ErasureReport",
    "Expected",
    "Exported",
    "Gate",
    "Holder",
    "Listed",
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
    "Verified",
    "back_up",
    "collect",
    "collect_litter",
    "compact",
    "compare_with_live",
    "count_exported",
    "demand_promotable",
    "deployment_diff",
    "deprecate",
    "erase",
    "erase_listed",
    "export",
    "faults_of_backup",
    "find_candidate",
    "load_snapshot",
    "move",
    "open_backcast",
    "open_backup",
    "open_new",
    "plan_collection",
    "plan_litter",
    "plan_promotion",
    "plan_rollback",
    "promote",
    "publish",
    "refresh",
    "register_version",
    "restore",
    "retire",
    "rollback",
    "run_order",
    "served_as",
    "sweep",
    "upsert",
    "upsert_batches",
    "verify",
    "withdraw_deprecation",
]
