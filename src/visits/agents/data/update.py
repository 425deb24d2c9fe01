#!/usr/bin/env python3
"""Makes bots.txt and families.json of the maintained lists.

    npm pack crawler-user-agents uap-core     # unpack each into a folder of its name
    ./update.py crawler-user-agents/package uap-core/package

Then state the versions in README.md and run `cargo test --lib agents`. Needs PyYAML.
"""

import json
import pathlib
import re
import sys

import yaml

HERE = pathlib.Path(__file__).parent

# Of crawler-user-agents, by pattern: programs that people look at pages with, tools, or words so short that other names hold them.
NONE = {
    "MetaIAB Facebook", "Notion\\/", "Asana\\/", "Trae\\/", "Tumblr\\/", "Grammarly\\/", "Instapaper\\/", "Sogou", "Viber",
    "Valve\\/Steam", "^Silk\\/", "PayPal\\/", "Overcast\\/", "PocketCasts\\/", "Operator\\/", "Devin", "Sonic", "Fluid",
    "Fever", "Magellan", "Trove", "Hello World", "Salesforce\\.com", "NING\\/", "YaK\\/", "008\\/", "BW\\/", "RED\\/",
    "Buck\\/", "Make\\/", "Uptime\\/", "s4a\\/", "eright", "speedy", "fluffy", "yanga", "linko", "Charlotte", "Splunk",
    "Butterfly", "Adventurer", "Scope3", "Stripe\\/", "Nitro-", "Genieo", "mail\\.ru", "Daum\\/", "Tweakers", "Upflow",
    "CapitalOneShopping", "Blackboard", "Disqus", "Klaviyo\\/", "Retool\\/", "Watchful", "Determ", "Yeti", "Freespoke\\/",
    "[wW]get", "HttpUrlConnection", "http_get", "Pcore-HTTP", "BTWebClient", "sindresorhus\\/got", "Fetch\\/",
}


def lines(name):
    return [line for line in (HERE / name).read_text().splitlines() if line and line[0] != "#"]


def main(crawlers, uap):
    patterns = [entry["pattern"] for entry in json.loads((crawlers / "crawler-user-agents.json").read_text())]
    for gone in NONE - set(patterns):
        print(f"no longer in the list: {gone}", file=sys.stderr)
    # `\/` is an escape of JavaScript's alone.
    kept = [pattern.replace("\\/", "/") for pattern in patterns if pattern not in NONE]
    # What tools.txt has is none. And half of the rest are the name of something-bot: each would cost 14 KiB of memory.
    kept = [it for it in kept if not any(re.search(line, it.strip("^"), re.IGNORECASE) for line in lines("tools.txt"))]
    kept = [it for it in kept if not any(re.fullmatch(line, it.rstrip("/"), re.IGNORECASE) for line in lines("generic.txt"))]
    (HERE / "bots.txt").write_text("".join(f"{pattern}\n" for pattern in kept))

    families = yaml.safe_load((uap / "regexes.yaml").read_text())
    wanted = {key: families[key] for key in ("user_agent_parsers", "os_parsers")}
    for parsers in wanted.values():
        for parser in parsers:
            # Versions are not kept; the crate would resolve them all the same.
            for key in [key for key in parser if "_v" in key or key[0] == "v"]:
                del parser[key]
    lists = (
        f'"{key}": [\n' + ",\n".join(json.dumps(parser, ensure_ascii=False) for parser in parsers) + "\n]"
        for key, parsers in wanted.items()
    )
    # The crate asks for all three lists; devices are told apart in families.rs.
    (HERE / "families.json").write_text("{\n" + ",\n".join(lists) + ',\n"device_parsers": []\n}\n')


main(*map(pathlib.Path, sys.argv[1:]))
