"""Patterns of private data in code, and the fixed values that replace them.

A pattern that is too broad damages code, one that is too narrow leaks; most lines below exclude
text that only looks like private data.
"""

import ipaddress
import re
from collections import namedtuple

# A pattern and its replacement: a fixed text, or a function that returns the match unchanged if it
# is something else. For speed: a text without the string `mark` or without a match of the pattern
# `quick` is not searched with the full pattern.
Private = namedtuple("Private", "mark pattern fake quick", defaults=[re.compile("")])

# Where an address or key may begin. The n of an escape "\n" in source code is not part of a word.
BEGIN = r"(?:(?<=\\[abfnrtv])|(?<!\\)\b|(?<=\\)(?![abfnrtv]))"

# Any top-level domain counts, so NOT_EMAIL excludes whatever else looks like an address: labels and
# scopes (this@Main.field), package versions (lib@1.2.3.tgz), files (icon@2x.png), systemd units,
# addresses reserved for examples, and git@, which is the user of a server, not a person.
EMAIL = re.compile(BEGIN + r"[\w.+-]{1,64}@(?:(?:[^\W_]|-)+\.)+(?:xn--[a-z0-9-]+|[^\W\d_]{2,24})"
                   r"(?!\w|-\w|\.\w|[@(\[])", re.IGNORECASE)
DOMAIN = re.compile(r"@(?<=[\w.+-]@)(?:[^\W_]|-)+\.[^\W\d_]")
NOT_EMAIL = re.compile(
    r"^(?:git|this|super|return|break|continue)@|@(?:self|cls|np|torch)\.|@\d+x\.|@v?\d+(?:\.\d+)+"
    r"[.-]|\.(?:png|jpe?g|gif|svg|webp|bmp|ico|tiff?|pdf|css|s[ac]ss|less|[cm]?[jt]sx?|json|html?|"
    r"xml|ya?ml|txt|java|class|jar|exe|dll|whl|tgz|tar|gz|service|socket|timer|weights?|bias|"
    r"values|data|grad)$|[@.]example\.[\w.]+$|\.(?:example|test|invalid|localhost)$", re.IGNORECASE)
# What precedes a matrix product (x = a@b.real), and what precedes a second product (a@b.inv@c.real)
# or the host of a URL with a user name (ssh://me@host.org)
BEFORE_PRODUCT = re.compile(r"(?:[=(+*/,-]|\breturn)\s*$")
NO_EMAIL_AFTER = re.compile(r"://[^\s/]*$|@[\w.]*$")

# A password in a URL, but not a variable or a placeholder such as "password"
URL_PASSWORD = re.compile(
    r"(://[^\s:/@'\"`<>(){}]*:)"
    r"(?!(?:KEY|pass(?:word|wd)?|pwd?|secret|token|x+|\.+|\*+)@|[$%][\w({])"
    r"[^\s/'\"`<>(){}]+(?=@(?!localhost|127\.)[\w\[])", re.IGNORECASE)

IPV4 = re.compile(r"\d(?:(?<=\\[abfnrtv]\d)|(?<![\w.]\d))"              # faster with a digit first
                  r"\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\w|-(?!\d+\.\d+\.))")
# Public IPv6 addresses are in 2000::/3, which excludes times, MAC addresses and std::
IPV6 = re.compile(r"[23](?:(?<=\\[abfnrtv][23])|(?<![\w:.][23]))[0-9a-f]{3}:(?:[0-9a-f]{0,4}:){1,6}"
                  r"(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{1,4}|(?<=::))(?!\w|:[\w:]|\.\w)",
                  re.IGNORECASE)
# What precedes a version of four numbers: version = "4.12.33.100", v 4.12.33.100, a list after
# ["version", pip install x==4.12.33.100, Chrome/4.12.33.100, other versions in a table
BEFORE_VERSION = re.compile(
    r"(?:(?:version\w*|(?:\b|_|pkg)(?:v|ver|rev|release|tag|firmware|section)s?)(?:\.\w+)?"
    r"(?: number)?(?: is)?[ \t\"'`*\]:=()>{\[,\d.-]*|"
    r"[\w\]'\"][=~]=|[<>~]=\s*|[~^]>?\s*|(?<![\w./])[A-Z][a-z]\w*/|"
    r"(?<![\w.])\d+\.\d+\.\d+[ \t]+)$", re.IGNORECASE)
DNS_SERVERS = {"8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"}

# The prefixes of keys, as in secret scanners, and what follows each. The last three lines are
# Shopify, DigitalOcean, Databricks, Vault, Grafana, Groq, xAI and Replicate
KEYS = {
    "AKIA": "[0-9A-Z]{16}", "ASIA": "[0-9A-Z]{16}",                                # AWS
    "AIza": r"[\w-]{35}", "GOCSPX-": r"[\w-]{28}", "ya29.": r"[\w-]{20,}",         # Google
    "ghp_": "[A-Za-z0-9]{36,}", "gho_": "[A-Za-z0-9]{36,}", "ghu_": "[A-Za-z0-9]{36,}",     # GitHub
    "ghs_": "[A-Za-z0-9]{36,}", "ghr_": "[A-Za-z0-9]{36,}", "github_pat_": r"\w{22,}",
    "glpat-": r"[\w-]{20,}", "glrt-": r"[\w-]{20,}", "gldt-": r"[\w-]{20,}",       # GitLab
    "glptt-": r"[\w-]{20,}", "glcbt-": r"[\w-]{20,}", "gloas-": r"[\w-]{20,}",
    "xox": r"[abceoprs]-[\w-]{10,}", "xapp-": r"\d-[\w-]{20,}",                    # Slack
    "hooks.slack.com/services/": r"[\w/]{30,}",
    "sk-": r"(?:[A-Za-z0-9]{32,}|(?=[A-Za-z_-]{0,99}\d)[\w-]{32,})",     # OpenAI, Anthropic, others
    "sk_": "(?:live|test)_[A-Za-z0-9]{16,}", "rk_": "(?:live|test)_[A-Za-z0-9]{16,}",       # Stripe
    "whsec_": r"[A-Za-z0-9+/=]{32,}",
    "hf_": "[A-Za-z0-9]{30,}", "npm_": "[A-Za-z0-9]{36}", "pypi-AgEI": r"[\w-]{50,}",
    "dckr_pat_": r"[\w-]{20,}", "SG.": r"[\w-]{16,32}\.[\w-]{16,64}",              # SendGrid
    "SK": "[0-9a-f]{32}", "key-": "[0-9a-f]{32}",                        # Twilio, Mailgun
    "eyJ": r"[\w-]{10,999}\.eyJ[\w-]{10,9999}\.[\w-]*",          # JSON Web Token
    "shpat_": "[0-9a-fA-F]{32}", "shpss_": "[0-9a-fA-F]{32}", "dop_v1_": "[0-9a-f]{64}",
    "dapi": "[0-9a-f]{32}", "hvs.": r"[\w-]{24,}", "glsa_": r"\w{32,}",
    "gsk_": "[A-Za-z0-9]{40,}", "xai-": "[A-Za-z0-9]{60,}", "r8_": "[A-Za-z0-9]{37}"}


def fake_email(match):
    before = match.string[max(0, match.start() - 80):match.start()]
    product = re.match(r"\w@[^.]+\.\w+$", match[0]) and BEFORE_PRODUCT.search(before)
    if product or NOT_EMAIL.search(match[0]) or NO_EMAIL_AFTER.search(before):
        return match[0]
    return "user@example.com"


def is_public(address):
    """Whether an IP address may identify somebody: not reserved, not a public DNS server."""
    try:
        return ipaddress.ip_address(address).is_global and address not in DNS_SERVERS
    except ValueError:
        return False


def fake_ipv4(match):
    """Replaces public addresses. Not an address: a version, which has three numbers below 10 or is
    called a version, and 2.5.29.*, the identifiers of X.509 extensions."""
    before = match.string[max(0, match.start() - 80):match.start()]
    small = sum(int(part) < 10 for part in match[0].split(".")) > 2
    version = small or match[0].startswith("2.5.29.") or BEFORE_VERSION.search(before)
    if before.endswith("-"):                                # a range of addresses, or name-1.2.3.4
        version = version or not re.search(r"\d\.\d+-$", before)
    return match[0] if version or not is_public(match[0]) else "192.0.2.1"


def fake_ipv6(match):
    is_slice = re.fullmatch(r"\d+::\d*", match[0])                         # as in x[2000::2]
    return match[0] if is_slice or not is_public(match[0].lower()) else "2001:db8::1"


PRIVATE = [
    Private("://", URL_PASSWORD, r"\1KEY"),
    Private("@", EMAIL, fake_email, DOMAIN),
    Private(":", IPV6, fake_ipv6),
    Private(".", IPV4, fake_ipv4),
    Private("PRIVATE KEY-", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
                                       r"((?:(?!-----)[\s\S])*)"
                                       r"-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"),
            lambda match: "KEY" if re.search("[A-Za-z0-9+/]{32}", match[1]) else match[0]),
    *(Private(name, re.compile(fr"({name}['\"]?\s*[:=]\s*['\"]?)[\w/+]{{40}}(?![\w/+])"), r"\1KEY")
      for name in ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY")),
    Private(":AA", re.compile(BEGIN + r"\d{8,10}:AA[\w-]{33}(?!\w)"), "KEY"),             # Telegram
    *(Private(prefix, re.compile(BEGIN + re.escape(prefix) + rest + r"(?!\w)"), "KEY")
      for prefix, rest in KEYS.items())]


def replace_private(text):
    """Replace e-mail addresses, public IP addresses, passwords in URLs and keys by fixed values."""
    for private in PRIVATE:
        if private.mark in text and private.quick.search(text):
            text = private.pattern.sub(private.fake, text)
    return text
