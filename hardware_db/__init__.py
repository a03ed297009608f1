"""What machines are: accelerators, nodes and clusters as sourced data, and the lookup that serves them.

>>> import hardware_db
>>> machine = hardware_db.cluster("dgx-h100*16")
>>> machine.num_devices, machine.device.id, [level.name for level in machine.levels]
(128, 'h100-sxm', ['nvswitch', 'network'])
>>> machine.device.peak_flops_per_s("bf16")
989000000000000.0
"""

from hardware_db.calibration import calibrated
from hardware_db.catalog import accelerator, accelerators, clusters, node, nodes, sources
from hardware_db.cluster_file import cluster_document, load_cluster, parse_cluster
from hardware_db.errors import ClusterFileError, HardwareError, MissingFactError, UnknownHardwareError
from hardware_db.facts import Dimensions, Fact, Source, facts_of
from hardware_db.machine import Cluster, Level, Slice
from hardware_db.pool_file import parse_pools
from hardware_db.pools import Pools, collective_library, join_pools
from hardware_db.profile import Profile, load_profile
from hardware_db.schema import Accelerator, Efficiency, Node
from hardware_db.slices import slice_shapes
from hardware_db.spec import cluster, cluster_or_pools
from hardware_db.transport import InNetworkReduction, MeasuredCollective, Protocol

__all__ = [
    "Accelerator",
    "Cluster",
    "ClusterFileError",
    "Dimensions",
    "Efficiency",
    "Fact",
    "HardwareError",
    "InNetworkReduction",
    "Level",
    "MeasuredCollective",
    "MissingFactError",
    "Node",
    "Pools",
    "Profile",
    "Protocol",
    "Slice",
    "Source",
    "UnknownHardwareError",
    "accelerator",
    "accelerators",
    "calibrated",
    "cluster",
    "cluster_document",
    "cluster_or_pools",
    "clusters",
    "collective_library",
    "facts_of",
    "join_pools",
    "load_cluster",
    "load_profile",
    "node",
    "nodes",
    "parse_cluster",
    "parse_pools",
    "slice_shapes",
    "sources",
]
