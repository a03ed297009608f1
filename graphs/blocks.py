from graphs.ir import Block, OpGraph
def find_blocks(graph: OpGraph) -> tuple[Block, ...]:
    return ()
