"""The diagrams of how-it-works.md: `python docs/diagrams.py` writes docs/images/how-*.svg, the same bytes every time.

Boxes, arrows and words alone, so that a change of an idea is a change of a few lines here.
"""

from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"
TEACHER, STUDENT, PHONE, NOTE, PLAIN = "#cfe0f5", "#fbd9b5", "#cdebd2", "#f3ecc8", "#ffffff"
INK, PALE = "#22303c", "#8896a3"
FONT = "font-family='Helvetica, Arial, sans-serif'"


class Drawing:
    """Shapes on a light ground (pages are light or dark), in pixels from the upper left."""

    def __init__(self, name: str, width: int, height: int, about: str) -> None:
        self.name, self.width, self.height, self.about = name, width, height, about
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, text: str = "", fill: str = PLAIN, size: int = 14):
        """A box with lines of text in its middle."""
        self.parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='5' fill='{fill}' stroke='{INK}'/>"
        )
        lines = text.split("\n")
        for number, line in enumerate(lines):
            middle = y + height / 2 + size * (0.35 + 1.2 * (number - (len(lines) - 1) / 2))
            self.text(x + width / 2, middle, line, size)

    def text(self, x: float, y: float, text: str, size: int = 14, anchor: str = "middle", colour: str = INK):
        self.parts.append(
            f"<text x='{x:g}' y='{y:g}' font-size='{size}' text-anchor='{anchor}' fill='{colour}'>{escape(text)}</text>"
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, dashed: bool = False):
        dashes = " stroke-dasharray='5 4'" if dashed else ""
        self.parts.append(
            f"<line x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}' stroke='{INK}' stroke-width='1.5' "
            f"marker-end='url(#head)'{dashes}/>"
        )

    def line(self, points: list[tuple[float, float]], colour: str = INK, width: float = 2.0):
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width:g}'/>")

    def dot(self, x: float, y: float, colour: str = INK, radius: float = 4):
        self.parts.append(f"<circle cx='{x:g}' cy='{y:g}' r='{radius:g}' fill='{colour}' stroke='{INK}'/>")

    def svg(self) -> str:
        head = (
            "<marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
            f"<path d='M0,0 L10,5 L0,10 z' fill='{INK}'/></marker>"
        )
        ground = f"<rect width='{self.width}' height='{self.height}' rx='8' fill='#fafafa'/>"
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' width='{self.width}' "
            f"role='img' {FONT}>\n<title>{escape(self.about)}</title>\n<defs>{head}</defs>\n{ground}\n"
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def proxies() -> Drawing:
    d = Drawing("proxies", 700, 250, "One teacher forward feeds every proxy block")
    d.text(20, 30, "one forward of the teacher", anchor="start", colour=PALE)
    d.arrow(15, 75, 45, 75)
    for i in range(4):
        x = 50 + 160 * i
        d.box(x, 50, 90, 50, f"layer {i}", TEACHER)
        d.arrow(x + 90, 75, x + 155, 75)
        d.text(x + 124, 67, f"h{i + 1}", 12)
        d.arrow(x - 18, 80, x - 18, 160, dashed=True)
        d.text(x - 8, 125, "in", 12, "start", PALE)
        for k, name in enumerate(("mlp", "attn", "both")):
            d.box(x - 12 + 40 * k, 165, 37, 32, name, STUDENT, 11)
        d.arrow(x + 112, 165, x + 122, 82, dashed=True)
        d.text(x + 100, 125, "loss", 12, "end", PALE)
    d.text(350, 230, "every stand-in sees the true input of its layer, and is held to the true output: nothing adds up")
    return d


def closed_form() -> Drawing:
    d = Drawing("closed-form", 700, 230, "A narrower MLP: neurons kept by importance, the output refitted")
    for i in range(8):
        kept = i in (0, 2, 3, 6)
        d.box(60, 18 + 25 * i, 130, 20, f"neuron {i}", TEACHER if kept else "#eeeeee", 12)
        if kept:
            d.arrow(195, 28 + 25 * i, 288, 68 + 30 * (0, 2, 3, 6).index(i))
    for place, i in enumerate((0, 2, 3, 6)):
        d.box(293, 58 + 30 * place, 130, 22, f"neuron {i}", STUDENT, 12)
    d.arrow(430, 115, 480, 115)
    d.box(485, 80, 195, 70, "output weights by least\nsquares, on calibration\nfeatures", NOTE, 13)
    d.text(580, 185, "no gradient step is taken", colour=PALE)
    return d


def merges() -> Drawing:
    d = Drawing("merges", 700, 200, "Two or three neighbouring layers become one")
    for i in range(7):
        d.box(30 + 94 * i, 25, 76, 44, f"layer {i}", TEACHER)
    for x, width, text, below in (
        (30, 76, "0", (0,)),
        (171, 76, "1 + 2", (1, 2)),
        (312, 76, "3", (3,)),
        (500, 76, "4 + 5 + 6", (4, 5, 6)),
    ):
        d.box(x, 125, width, 44, text, STUDENT)
        for i in below:
            d.arrow(68 + 94 * i, 70, x + width / 2, 122)
    d.text(
        350, 192, "heads and neurons of the merged layers are pooled; the pooled ones that matter stay", 13, colour=PALE
    )
    return d


def search() -> Drawing:
    d = Drawing("search", 700, 260, "The integer programme proposes, Bayes refines with real distances")
    d.box(20, 30, 150, 56, "bank: loss\nof every proxy", STUDENT)
    d.box(20, 110, 150, 56, "latency table:\nms of every proxy", PHONE)
    d.box(230, 60, 170, 76, "integer programme:\nleast summed loss under\neach budget, proved", NOTE, 13)
    d.arrow(172, 60, 226, 85)
    d.arrow(172, 136, 226, 115)
    d.arrow(402, 98, 456, 98)
    d.box(460, 60, 210, 76, "assemble, sample, measure\nthe Fréchet distance", TEACHER, 13)
    d.arrow(565, 140, 565, 186)
    d.box(460, 190, 210, 50, "Gaussian process around\nthe summed loss", NOTE, 13)
    d.arrow(458, 215, 402, 215)
    d.box(230, 190, 170, 50, "next genotypes", PLAIN, 13)
    d.arrow(400, 192, 470, 140)
    d.text(20, 215, "start: near the front", 13, "start", PALE)
    d.text(20, 233, "end: the front itself", 13, "start", PALE)
    return d


def latency() -> Drawing:
    d = Drawing("latency", 700, 230, "Whole networks are timed and taken apart by least squares")
    kinds = {"o": TEACHER, "m": STUDENT, "a": PHONE}
    for row, (layers, ms) in enumerate((("oooooo", "a"), ("mmmmmm", "b"), ("aaaaaa", "c"), ("omaoam", "d"))):
        for i, layer in enumerate(layers):
            d.box(20 + 46 * i, 25 + 45 * row, 40, 32, layer, kinds[layer])
        d.text(328, 46 + 45 * row, f"{ms} ms", 14)
    d.text(170, 220, "networks of equal layers, and mixed ones, in turns", 13, colour=PALE)
    d.arrow(360, 105, 420, 105)
    d.box(
        425, 50, 255, 110, "time of a student\n= trunk + sum of its layers\n(least squares, nothing\nbelow zero)", NOTE
    )
    d.text(552, 190, "judged by 16 networks it never saw", 13, colour=PALE)
    return d


def elastic() -> Drawing:
    d = Drawing("elastic", 700, 250, "A narrow network uses the first rows and columns of every matrix")
    d.box(40, 25, 200, 200, "", TEACHER)
    d.box(40, 25, 100, 100, "", STUDENT)
    d.box(40, 25, 75, 75, "tiny", PHONE)
    d.text(112, 118, "small", 12)
    d.text(200, 215, "full", 14)
    d.text(140, 243, "one weight matrix, three networks", 13, colour=PALE)
    d.arrow(250, 125, 300, 125)
    d.box(305, 30, 165, 60, "full net: data loss", TEACHER)
    d.box(305, 160, 165, 60, "drawn width: data loss\n+ the full net's output", STUDENT, 13)
    d.arrow(387, 92, 387, 156, dashed=True)
    d.text(400, 130, "teaches", 13, "start", PALE)
    d.arrow(475, 60, 530, 110)
    d.arrow(475, 190, 530, 140)
    d.box(535, 95, 145, 60, "gradients balanced\nwhere shared", NOTE, 13)
    return d


def sparse() -> Drawing:
    d = Drawing("sparse", 700, 240, "Each token sees its neighbourhood in full and the whole image compressed")
    for row in range(8):
        for column in range(8):
            near = 2 <= row <= 5
            fill = "#e8553f" if (row, column) == (3, 3) else PHONE if near else PLAIN
            d.box(30 + 22 * column, 25 + 22 * row, 20, 20, "", fill)
    d.text(118, 222, "own strip and its neighbours", 13, colour=PALE)
    for row in range(4):
        for column in range(4):
            d.box(270 + 44 * column, 25 + 44 * row, 40, 40, "", STUDENT)
    d.text(358, 222, "all tokens, keys 2 x 2 at once", 13, colour=PALE)
    d.arrow(212, 60, 500, 85)
    d.arrow(448, 150, 500, 130)
    d.box(505, 75, 175, 70, "gate: how much of each,\na head and token", NOTE)
    return d


def few_step() -> Drawing:
    d = Drawing("few-step", 700, 300, "Knowledge and distribution matching on the student's own path")
    xs = (40, 190, 340, 490, 640)
    for i, x in enumerate(xs):
        d.dot(x, 60, STUDENT, 9)
        d.text(x, 35, ("noise", "x(451)", "x(300)", "x(150)", "image")[i], 13)
        if i < 4:
            d.arrow(x + 12, 60, xs[i + 1] - 12, 60)
    d.text(115, 82, "student: four steps, no guidance", 13, "start", PALE)
    for i in range(7):
        d.dot(200 + 22 * i, 125 + 3 * (i - 3) ** 2 - 20, TEACHER, 4)
    d.arrow(190, 72, 196, 118, dashed=True)
    d.text(265, 165, "the many-step net goes the same way, guided:", 13, colour=PALE)
    d.text(265, 182, "the straight line to its end is the velocity to learn", 13, colour=PALE)
    d.arrow(640, 72, 600, 120, dashed=True)
    d.box(470, 125, 200, 36, "noised again", PLAIN, 13)
    d.box(440, 205, 120, 44, "real score\n(frozen net)", TEACHER, 12)
    d.box(580, 205, 110, 44, "critic\n(learns along)", STUDENT, 12)
    d.arrow(540, 163, 505, 201)
    d.arrow(600, 163, 630, 201)
    d.text(565, 275, "their difference: where samples should move", 13, colour=PALE)
    d.box(60, 225, 300, 50, "student and critic are adapters of one net:\nthe memory of one", NOTE, 13)
    return d


def palettes() -> Drawing:
    d = Drawing("palettes", 700, 230, "Each layer's weights share a palette of values")
    points = [(20 + 2.6 * x, 150 - 110 * 2.718281828 ** (-(((x - 50) / 20) ** 2))) for x in range(101)]
    d.line(points)
    d.line([(20, 150), (285, 150)], PALE, 1)
    for x in (15, 27, 36, 43, 50, 57, 64, 73, 85):
        d.dot(20 + 2.6 * x, 150, STUDENT, 5)
    d.text(150, 182, "values where the weights are (k-means),", 13, colour=PALE)
    d.text(150, 200, "not at even distances", 13, colour=PALE)
    d.arrow(300, 100, 340, 100)
    d.box(345, 35, 150, 130, "bits a layer:\n8, 5, 4, 3 …\nby how far the\noutput moves\n(exact, 4.3 in all)", NOTE, 13)
    d.arrow(500, 100, 535, 100)
    d.box(
        540,
        35,
        145,
        130,
        "rounding errors\nare made good in the\nweights not yet\nrounded; then\nself-distillation",
        PHONE,
        13,
    )
    return d


def export() -> Drawing:
    d = Drawing("export", 700, 240, "One lowering a format, verified, with a contract for ports")
    d.box(20, 90, 120, 60, "pipeline", STUDENT)
    for i, name in enumerate(("ONNX", "ExecuTorch", "Core ML", "web page")):
        d.box(210, 20 + 53 * i, 120, 42, name, PHONE)
        d.arrow(142, 120, 206, 41 + 53 * i)
        d.arrow(332, 41 + 53 * i, 386, 120)
    d.box(390, 85, 110, 70, "verified:\nevery step\nand picture", NOTE, 13)
    d.arrow(502, 120, 536, 120)
    d.box(
        540,
        50,
        145,
        140,
        "contract.json:\ntensors, order of calls,\nsampler as numbers,\nnoise of a seed,\nreference",
        PLAIN,
        13,
    )
    d.text(350, 232, "the file that is timed for the search is the file that ships", 13, colour=PALE)
    return d


def main(folder: Path = IMAGES) -> None:
    for made in (proxies, closed_form, merges, search, latency, elastic, sparse, few_step, palettes, export):
        drawing = made()
        (folder / f"how-{drawing.name}.svg").write_text(drawing.svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
