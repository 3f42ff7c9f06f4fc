// Which runs a measurement has, and in which order. Nothing here touches the page.

/** Networks in groups that may be open together: as many as fit into `room` bytes, at least one. */
export function groupsOf(networks, { copies, fixed_bytes: fixed }, room) {
  const groups = [];
  let taken = Infinity;
  for (const { name, bytes } of networks) {
    if (taken + copies * bytes > room) {
      groups.push([]);
      taken = fixed;
    }
    groups.at(-1).push(name);
    taken += copies * bytes;
  }
  return groups;
}

/** The visits of a measurement, {pass, names}: every pass goes through all groups, every second one backwards. */
export function visitsOf({ passes }, groups) {
  return Array.from({ length: passes }, (_, pass) => (pass % 2 ? [...groups].reverse() : groups))
    .flatMap((order, pass) => order.map((names) => ({ pass, names: pass % 2 ? [...names].reverse() : names })));
}

/** The runs of a visit, {network, phase, round}: every network's load and warm-ups, then this pass's part of the rounds,
 *  in each of which every network runs once, in every second one backwards. */
export function runsOf({ passes, warmups, rounds }, { pass, names }) {
  const runs = [];
  for (const network of names) {
    runs.push({ network, phase: "cold", round: pass });
    for (let i = 0; i < warmups; i++) runs.push({ network, phase: "warm", round: pass * warmups + i });
  }
  const end = Math.floor(((pass + 1) * rounds) / passes);
  for (let round = Math.floor((pass * rounds) / passes); round < end; round++) {
    for (const network of round % 2 ? [...names].reverse() : names) runs.push({ network, phase: "timed", round });
  }
  return runs;
}

/** What tells a run from every other one. */
export const placeOf = ({ network, phase, round }) => `${network} ${phase} ${round}`;

/** Seconds to wait before the next attempt, after so many that failed. */
export const backoff = (failed) => Math.min(30, 0.5 * 2 ** Math.min(failed, 10));

/** A time that is left, in words. */
export function inWords(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
