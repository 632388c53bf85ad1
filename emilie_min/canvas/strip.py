"""A strip of pictures with captions and outlined masks, as in the paper's Fig. 1."""

import unicodedata

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from ..errors import note, printable

INK, PAPER, OUTLINE = (40, 40, 40), (255, 255, 255), (255, 0, 120)


FONTS = (  # of common systems, for what Pillow's own font cannot show
    ["DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "segoeui.ttf"]
    + ["NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "msyh.ttc"]
    + ["DroidSansFallbackFull.ttf", "YuGothM.ttc", "meiryo.ttc", "malgun.ttf", "PingFang.ttc", "Arial Unicode.ttf"]
    + ["unifont.otf", "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansThai-Regular.ttf"]
)


def enlarge(image: Image.Image, height: int) -> Image.Image:
    """At `height` px, in whole steps where it grows, so that small pictures keep their pixels."""
    if image.height < height:
        times = max(1, height // image.height)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)


def outlined(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """The picture with the border of its mask drawn, 2 px wide, inside the mask."""
    if mask is None:
        return image
    mask = mask.resize(image.size, Image.Resampling.NEAREST).point(lambda v: 255 if v >= 128 else 0)
    framed = Image.new("L", (mask.width + 2, mask.height + 2))
    framed.paste(mask, (1, 1))
    inner = framed.filter(ImageFilter.MinFilter(5)).crop((1, 1, mask.width + 1, mask.height + 1))
    return Image.composite(Image.new("RGB", image.size, OUTLINE), image, ImageChops.subtract(mask, inner))


def strip(cells: list[tuple[Image.Image, str, Image.Image | None]], height: int = 256, gap: int = 12) -> Image.Image:
    """Pictures side by side; cells: (picture, caption, mask or None). The mask is where that picture was edited."""
    font = font_for("".join(text for _, text, _ in cells), max(12, height // 16))
    pictures = [outlined(enlarge(image, height), mask) for image, _, mask in cells]
    captions = [wrap(text, picture.width, font) for (_, text, _), picture in zip(cells, pictures, strict=True)]
    line = sum(font.getmetrics()) + 2
    room = gap + line * max(text.count("\n") + 1 for text in captions)
    tall = max(picture.height for picture in pictures)
    out = Image.new("RGB", (sum(p.width + gap for p in pictures) + gap, tall + gap + room), PAPER)
    draw, x = ImageDraw.Draw(out), gap
    for picture, text in zip(pictures, captions, strict=True):
        out.paste(picture, (x, gap))
        draw.multiline_text((x, gap + tall + gap // 2), text, fill=INK, font=font)
        x += picture.width + gap
    return out


def sheet(
    title: str, cells: list[tuple[Image.Image, str, Image.Image | None]], columns: int, first: Image.Image
) -> Image.Image:
    """A contact sheet: a title, the first picture, and rows of `columns` cells, see `strip`."""
    rows = [[(first, "input", None)], *(cells[i : i + columns] for i in range(0, len(cells), columns))]
    strips = [strip(row, height=192) for row in rows]
    font = font_for(title, 18)
    head = sum(font.getmetrics()) + 16
    width = max(max(row.width for row in strips), round(font.getlength(title)) + 24)
    out = Image.new("RGB", (width, head + sum(row.height for row in strips)), PAPER)
    ImageDraw.Draw(out).text((12, 8), title, fill=INK, font=font)
    y = head
    for row in strips:
        out.paste(row, (0, y))
        y += row.height
    return out


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font or, where that lacks a character, the first one here with all, or with most, which is told."""
    best = ImageFont.load_default(size=size)
    lacking = missing(text, best)
    for name in FONTS if lacking else ():
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        if len(less := missing(text, font)) < len(lacking):
            best, lacking = font, less
        if not lacking:
            break
    if lacking:
        note(
            f"the strip's captions lack {printable(''.join(sorted(lacking)), 40)}, for which no font was found here: "
            "install one, such as Noto Sans CJK"
        )
    return best


def missing(text: str, font: ImageFont.FreeTypeFont) -> set[str]:
    """The characters for which a font draws what it draws for one that is none."""

    def drawn(character: str) -> tuple:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    nothing = drawn("\U0010ffff")
    seen = {c for c in text if not c.isspace() and unicodedata.category(c)[0] not in "CM"}
    return {c for c in seen if not c.isascii() and drawn(c) == nothing}


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines).strip()
