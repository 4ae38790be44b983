// Which SSR LoRA comes where. Plain values: a chain is {socket, head, nodes}, with `nodes` from first to last and
// `head` whatever feeds the first one (null, or something that is no SSR LoRA and stays where it is).

/** All nodes of all chains in the order of the merge. */
export const flat = (chains) => chains.flatMap((chain) => chain.nodes);

/** The chains with the nodes at two places of the order exchanged; a new value. */
export function exchanged(chains, a, b) {
  const order = flat(chains);
  if (!(a in order) || !(b in order)) return chains;
  [order[a], order[b]] = [order[b], order[a]];
  let at = 0;
  return chains.map((chain) => ({ ...chain, nodes: chain.nodes.map(() => order[at++]) }));
}

/** The chains without one node; a new value. */
export const without = (chains, node) =>
  chains.map((chain) => ({ ...chain, nodes: chain.nodes.filter((other) => other !== node) }));

/**
 * What has to be connected to what: `source` is a node, a head, or null for nothing; `target` is a node (its
 * `previous`) or a socket.
 */
export function wanted(chains) {
  const links = [];
  for (const { socket, head, nodes } of chains) {
    nodes.forEach((node, i) => links.push({ source: i ? nodes[i - 1] : head, node }));
    links.push({ source: nodes.length ? nodes[nodes.length - 1] : head, socket });
  }
  return links;
}

/** Which chains differ: those need new links. */
export const changed = (before, after) =>
  after.filter((chain, i) => chain.nodes.some((n, j) => n !== before[i].nodes[j]) || chain.nodes.length !== before[i].nodes.length);
