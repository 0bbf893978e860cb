// Noise of a video: standard normal numbers that depend on its seed alone, drawn in order.
//
// A counter-based generator: draw n is the finaliser of MurmurHash3 over a key of the seed plus n times the golden ratio (as SplitMix does), and
// two draws make two normals (Box and Muller). The key changes after 2^32 draws. It is the page's own: `generate.py` draws other noise.

const GOLDEN = 0x9e3779b9;

function mixed(word: number): number {
  word = Math.imul(word ^ (word >>> 16), 0x85ebca6b);
  word = Math.imul(word ^ (word >>> 13), 0xc2b2ae35);
  return (word ^ (word >>> 16)) >>> 0;
}

export class Noise {
  private low = 0;
  private high = 0;

  constructor(private readonly seed: number) {}

  /** The next `size` numbers; size is even. */
  draw(size: number): Float32Array {
    const normals = new Float32Array(size);
    for (let index = 0; index < size; index += 2) {
      const radius = Math.sqrt(-2 * Math.log((this.next() + 1) / 2 ** 32)); // of a number in (0, 1]
      const angle = (2 * Math.PI * this.next()) / 2 ** 32;
      normals[index] = radius * Math.cos(angle);
      normals[index + 1] = radius * Math.sin(angle);
    }
    return normals;
  }

  private next(): number {
    const key = mixed(this.seed ^ mixed(this.high));
    const word = mixed((key + Math.imul(this.low, GOLDEN)) >>> 0);
    this.low = (this.low + 1) >>> 0;
    if (this.low === 0) this.high = (this.high + 1) >>> 0;
    return word;
  }
}
