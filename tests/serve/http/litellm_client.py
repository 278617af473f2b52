"""Ask a server for pictures by LiteLLM, and print what it gives as JSON: python litellm_client.py URL FILE."""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices

import litellm

litellm.suppress_debug_info = True
url, file = sys.argv[1:]
to = {"model": "openai/tiny", "api_base": url, "api_key": "none"}
few = {"steps": 4, "guidance_scale": 1.0, "seed": 5}


def pictures(answer):
    """Return the pictures of an answer."""
    return [one.b64_json for one in answer.data]


def main():
    """Ask for a picture, for two, for two at the same time, for an edit, and for what is refused."""

    async def both():
        calls = (litellm.aimage_generation(prompt="fox", **to, extra_body=few | {"seed": seed}) for seed in (5, 6))
        return [picture for answer in await asyncio.gather(*calls) for picture in pictures(answer)]

    generated, two = (pictures(litellm.image_generation(prompt="fox", n=n, **to, extra_body=few)) for n in (1, 2))
    with open(file, "rb") as sent:
        edited = pictures(litellm.image_edit(image=sent, prompt="fox", **to, extra_body=few | {"strength": 0.5}))
    try:
        litellm.image_generation(prompt="fox", size="7x7", max_retries=0, **to)
        refused = None
    except litellm.BadRequestError as error:
        refused = [error.status_code, str(error)]
    drawn = {"generated": generated, "two": two, "both": asyncio.run(both()), "edited": edited}
    print(json.dumps({**drawn, "refused": refused}))


main()
