// The noise of a seed, as contract.json's `noise` says: Philox4x32-10 and Box and Muller in float64. It is the noise of
// sample_min.py, but for the last bit of a logarithm, sine or cosine.

/** The upper 32 bits of the product of two 32-bit words. */
function high(a, b) {
  const [a0, a1, b0, b1] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = a1 * b0 + ((a0 * b0) >>> 16); // each sum is below 2^32
  const other = a0 * b1 + (middle & 0xffff);
  return (a1 * b1 + (middle >>> 16) + (other >>> 16)) >>> 0;
}

/** Philox4x32-10 (Salmon et al., 2011): the four 32-bit words of a counter's four and a key's two. */
export function philox([a, b, c, d], [key0, key1]) {
  for (let round = 0; round < 10; round++) {
    const [first, second] = [high(a, 0xd2511f53), high(c, 0xcd9e8d57)];
    const [low0, low1] = [Math.imul(a, 0xd2511f53), Math.imul(c, 0xcd9e8d57)];
    [a, b, c, d] = [second ^ b ^ key0, low1, first ^ d ^ key1, low0].map((word) => word >>> 0);
    [key0, key1] = [(key0 + 0x9e3779b9) >>> 0, (key1 + 0xbb67ae85) >>> 0];
  }
  return [a, b, c, d];
}

/**
 * Standard normal noise: a Float32Array of `count` values of a seed, 0 … 2^63 - 1. A number above 2^53 - 1 has lost
 * digits, so such a seed is a BigInt or a string.
 */
export function standardNormal(seed, count) {
  if (typeof seed === "number" && !Number.isSafeInteger(seed)) throw new RangeError(`the seed ${seed} is no exact whole number`);
  const whole = BigInt(seed);
  if (whole < 0n || whole >= 1n << 63n) throw new RangeError(`the seed ${seed} is not from 0 to 2^63 - 1`);
  const key = [Number(whole & 0xffffffffn), Number(whole >> 32n)];
  const values = new Float32Array(count);
  for (let block = 0; 4 * block < count; block++) {
    const words = philox([block >>> 0, Math.floor(block / 2 ** 32), 0, 0], key);
    const u = words.map((word) => (word + 0.5) / 2 ** 32); // never 0, never 1
    for (const pair of [0, 2]) {
      const radius = Math.sqrt(-2 * Math.log(u[pair]));
      const angle = 2 * Math.PI * u[pair + 1];
      values[4 * block + pair] = radius * Math.cos(angle); // what lies behind the end of the array is dropped
      values[4 * block + pair + 1] = radius * Math.sin(angle);
    }
  }
  return values;
}
