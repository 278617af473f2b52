"""Marks: XMP packets that say by IPTC's words that a model made a picture, all of it or a part.

The text is constant, so that the same seed still gives the same bytes.
"""

from __future__ import annotations

from xml.etree import ElementTree

from PIL import Image

__all__ = ["COMPOSITE", "GENERATED", "mark", "source_type_of"]

# Terms of the vocabulary http://cv.iptc.org/newscodes/digitalsourcetype: what a model generated, and what it made of
# something else, as inpainting and outpainting do.
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"

# Source: IPTC Photo Metadata Standard 2023.1, property Digital Source Type; XMP specification part 1 (ISO 16684-1),
# section 7.3.2 (packet wrapper), read-only as PNG needs it (part 3).
PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
    ' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
    '  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">\n'
    "   <Iptc4xmpExt:DigitalSourceType>{}</Iptc4xmpExt:DigitalSourceType>\n"
    "  </rdf:Description>\n"
    " </rdf:RDF>\n"
    "</x:xmpmeta>\n"
    '<?xpacket end="r"?>'
)
PROPERTY = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
RESOURCE = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}resource"
MAX_BYTES = 2**20  # of a packet that is read


def mark(source_type: str) -> bytes:
    """Return the XMP packet of `GENERATED` or `COMPOSITE`."""
    return PACKET.format(source_type).encode()


def source_type_of(image: Image.Image) -> str | None:
    """Return the IPTC digital source type that the XMP of a decoded picture names, whatever wrote it; None without."""
    packet = image.info.get("xmp")
    packet = packet.encode() if isinstance(packet, str) else packet
    # Entities, by which a short text becomes a huge one, have no place in XMP.
    if not isinstance(packet, bytes) or len(packet) > MAX_BYTES or b"<!DOCTYPE" in packet:
        return None
    try:
        root = ElementTree.fromstring(packet.rstrip(b"\0"))
    except (ElementTree.ParseError, ValueError, LookupError):
        return None
    for element in root.iter():
        text = element.get(PROPERTY) or (
            (element.text or "").strip() or element.get(RESOURCE) if element.tag == PROPERTY else None
        )
        if text:
            return text
    return None
