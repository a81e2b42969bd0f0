"""What moving bytes between devices takes: over the links of a node, and over the network between nodes.

The devices of an engine are numbered stage by stage; a node holds as many whole stages as fit, or a stage fills whole
nodes. Bandwidths are a device's own, one direction: every device of a stage moves its part at the same time.
"""

from __future__ import annotations

from testbed.costs.devices import DeviceProfile
from testbed.scenario.errors import InputError


def nodes_of_stage(device: DeviceProfile, tp: int) -> int:
    """Nodes that the ``tp`` devices of a stage fill.

    Raises InputError when they fill no whole nodes, or the profile knows of no network between them.
    """
    per_node = device.devices_per_node
    if tp <= per_node:
        return 1
    if tp % per_node:
        message = f"tp {tp} does not fill whole nodes of {per_node} devices"
        remedy = f"at most {per_node}, or a multiple of it"
        raise InputError(message, where="engine.parallel.tp", remedy=remedy)
    device.network("engine.parallel.tp")
    return tp // per_node


def leaves_node(device: DeviceProfile, tp: int, stage: int) -> bool:
    """Whether ``stage`` and the next are on different nodes. Raises InputError when they are and the profile knows of
    no network between them."""
    stages_per_node = device.devices_per_node // tp
    if stages_per_node and stage // stages_per_node == (stage + 1) // stages_per_node:
        return False
    device.network("engine.parallel.pp")
    return True


def move_ns(device: DeviceProfile, node_bytes: float, network_bytes: float = 0.0) -> float:
    """Time of an operation in which each device moves ``node_bytes`` over its link and then ``network_bytes`` over its
    network adapter, both at the profile's ``link_efficiency``, behind one latency."""
    formula = device.formula
    total = node_bytes / (formula.link_efficiency * device.link_bytes_per_ns)
    if network_bytes:
        total += network_bytes / (formula.link_efficiency * device.network("device"))
    return total + formula.all_reduce_ns
