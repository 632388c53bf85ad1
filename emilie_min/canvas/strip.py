"""A strip of pictures with captions and outlined masks, as in the paper's Fig. 1."""

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

INK, PAPER, OUTLINE = (40, 40, 40), (255, 255, 255), (255, 0, 120)


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
    font = ImageFont.load_default(size=max(12, height // 16))
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


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines).strip()
