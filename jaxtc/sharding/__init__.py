"""Where arrays lie: rules, meshes, placement on them, and many processes."""

from jaxtc.sharding.mesh import make_mesh as make_mesh
from jaxtc.sharding.mesh import shard as shard
from jaxtc.sharding.rules import RULES as RULES
from jaxtc.sharding.rules import ShardingError as ShardingError
