"""pytest tests/test_private_data.py"""

import re

import pytest

from support.private_data import replace_private


def test_private_data_get_fakes():
    cases = {"mail me@work.org or a.b+c@x-y.co.uk.": "mail user@example.com or user@example.com.",
             "x = a@b.weight  # user@example.org": "x = a@b.weight  # user@example.org",
             "at 93.184.216.34:80": "at 192.0.2.1:80", "version 1.2.3.4": "version 1.2.3.4",
             "127.0.0.1 10.0.0.7 8.8.8.8 1.2.3.4.5 999.1.1.1":
                 "127.0.0.1 10.0.0.7 8.8.8.8 1.2.3.4.5 999.1.1.1",
             "AKIA" + "ABCDEFGHIJKLMNOP": "KEY", "ghp_" + "a1" * 18: "KEY",
             "-----BEGIN RSA PRIVATE KEY-----\n" + "a1b2" * 16 + "\n-----END RSA PRIVATE KEY-----":
                 "KEY",
             "ME@WORK.COM and from 93.184.216.34.": "user@example.com and from 192.0.2.1.",
             r'"Mail:\nme@work.org"': r'"Mail:\nuser@example.com"',       # in source: an escape
             r"Doe\\jane@uni.edu": r"Doe\\user@example.com",
             r"CORP\john@corp.com": r"CORP\user@example.com",
             r'"\t93.184.216.34"': r'"\t192.0.2.1"', r'"\nsk-' + "a" * 40 + '"': r'"\nKEY"'}
    assert {text: replace_private(text) for text in cases} == cases
    code = ['START = b"-----BEGIN OPENSSH PRIVATE KEY-----"\nEND = b"-----END OPENSSH PRIVATE '
            'KEY-----"', 'ObjectIdentifier("2.5.29.17")', "git clone git@github.com:o/r.git"]
    assert all(replace_private(kept) == kept for kept in (*code, *cases.values()))


@pytest.mark.parametrize("text", [
    "kim@firma.co.kr", "li@uni.edu.tw", "a@b.co", "o'neil <x@y.museum>", "jörg@müller.de",
    "a+tag@sub.x-y.technology", "me@xn--bcher-kva.xn--p1ai", "kim@163.com", "(me@work.pizza)",
    "mail: me@work.org.", "mailto:me@work.ai", "http://h.de/?mail=me@work.org"])
def test_addresses_of_any_domain(text):
    address = re.search(r"[\w+]+@[\w.-]*\w", text)[0]
    assert replace_private(text) == text.replace(address, "user@example.com")


@pytest.mark.parametrize("text", [
    "icon@2x.png", "logo@large.svg", "left-pad@1.2.3", "lib@1.2.3.tgz", "react@^18.2.0",
    "user@host", "@app.route('/')", "x = q@k.transpose(1)", "x = a@b.weight",
    "y = x@self.scale.real", "return a@b.inv@c.imag", "git@github.com:o/r.git",
    "ssh://me@host.org/x", "s@foo@bar.baz@", "this@MainActivity.field", "getty@tty1.service",
    "https://unpkg.com/vue@3.2.1/dist/vue.js",
    "kim@example.org", "kim@mail.example.com", "kim@host.test", "a @ b.com", "memcpy@GLIBC_2.14"])
def test_what_is_no_address(text):
    assert replace_private(text) == text


@pytest.mark.parametrize("text,password", [
    ("postgres://kim:s3cr3t@db.firma.de/x", "s3cr3t"), ("redis://:p%40ss@10.0.0.7:6379", "p%40ss"),
    ("https://kim:ghx@[2001:db8::1]/", "ghx"), ("http://u:a:b@host", "a:b"),
    ("amqps://u:p@ss@host", "p@ss"),
    ("http://kim:${PASSWORD}@host.de", None), ("http://{user}:{key}@host.de", None),
    ("http://user:password@host.de", None), ("http://%s:%s@host.de", None),
    ("http://a:b@localhost:80/", None), ("http://host.de:80/@kim", None)])
def test_passwords_in_urls(text, password):
    replaced = text.replace(f":{password}@", ":KEY@")
    assert replace_private(text) == replaced == replace_private(replaced)


def test_ip_addresses():
    public = "2a00:1450:4001:82f::200e"
    fakes = {f"http://[{public}]:80/": "http://[2001:db8::1]:80/", f"{public}/64": "2001:db8::1/64",
             public.upper(): "2001:db8::1", "2606:4700::1111,": "2001:db8::1,",
             "2001:470:1f0b:1:2:3:4:5": "2001:db8::1", "2a00:1450:4001::93.184.216.34":
             "2001:db8::1", f"at {public}.": "at 2001:db8::1.", f"{public}%et": "2001:db8::1%et",
             "::ffff:93.184.216.34": "::ffff:192.0.2.1", "a 2a00:1450::1:0: b": "a 2001:db8::1: b",
             "93.184.216.34-93.184.216.40": "192.0.2.1-192.0.2.1",
             '"\\n' + public + '"': '"\\n2001:db8::1"', 'if ip == "93.184.216.34"':
             'if ip == "192.0.2.1"', "<ip>93.184.216.34</ip>": "<ip>192.0.2.1</ip>",
             "host = 93.184.216.34": "host = 192.0.2.1", "http://93.184.216.34/a":
             "http://192.0.2.1/a", "version 2.1 at 93.184.216.34": "version 2.1 at 192.0.2.1"}
    for name in ("server", "reverse", "verify", "covers", "release_host =", "Version: 2\n"):
        fakes[f"{name} 93.184.216.34"] = f"{name} 192.0.2.1"
    assert {text: replace_private(text) for text in fakes} == fakes
    kept = ["::1", "fe80::1%eth0", "fd12:3456:789a::1", "2001:db8::8a2e:370:7334", "x[2000::2]",
            "x[2000:3000:2]", "std::vector<int>", "a::b::c", "12:30:45", "2023:10:05 12:30:45",
            "2c:54:91:88:c9:e3", "20:c9:d0:7a:fa:31", "a {color: #2a2a2a}", "2001:4860:4860::8888",
            "x[2000::]", "sha256:2a2a:3b3b", "2000: 3f3f 4a4a",
            'VERSION = "4.12.33.100"', '"version": "4.12.33.100"', "<Version>4.12.33.100</Version>",
            'versions = ["14.12.33.100", "14.12.33.101"]', "pip install x==14.12.33.100",
            "x>=14.12.33.100", "v14.12.33.100", "v 14.12.33.100", "14.12.33.100-beta",
            "14.12.33.100b", "14.12.33.100.7", 'AssemblyVersion("14.12.33.100")',
            "Chrome/14.12.33.100", "pkgver=14.12.33.100", "'==14.12.33.100'", "tag: 14.12.33.100",
            "Version `14.12.33.100`", "The version number is 14.12.33.100",
            "x-14.12.33.100.tar.gz", "libx-14.12.33.100", "10.2.4\t16.8.172.17\t1.47.0",
            "14.12.33.300", "min_version='14.12.33.100'", "release 14.12.33.100",
            "__version__ = '14.12.33.100'"]
    assert [replace_private(text) for text in kept] == kept


LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7" * 5
HEX = "0a1b2c3d4e5f6789" * 4


@pytest.mark.parametrize("key", [
    "github_pat_" + LETTERS[:22] + "_" + LETTERS[:59], *(f"gh{c}_" + LETTERS[:36] for c in "pousr"),
    "glpat-" + LETTERS[:20], "xoxb-123456789012-123456789012-" + LETTERS[:24],
    "https://hooks.slack.com/services/T0123ABCD/B0123ABCD/" + LETTERS[:24],
    "sk_live_" + LETTERS[:24], "rk_live_" + LETTERS[:24], "sk-" + LETTERS[:48], "sk-" + HEX[:32],
    "sk-proj-" + LETTERS[:20] + "_-" + LETTERS[:40], "sk-ant-api03-" + LETTERS[:93] + "-AA",
    "hf_" + LETTERS[:34], "ASIA" + "ABCDEFGHIJKLMNOP", "AIza" + LETTERS[:35], "npm_" + LETTERS[:36],
    "pypi-AgEI" + LETTERS[:80], "SG." + LETTERS[:22] + "." + LETTERS[:43], "SK" + HEX[:32],
    "123456789:AA" + LETTERS[:33], f"eyJ{LETTERS[:20]}.eyJ{LETTERS[:30]}.{LETTERS[:43]}",
    "dop_v1_" + HEX, "hvs." + LETTERS[:24]])
def test_keys_of_every_kind(key):
    fake = "https://KEY" if key.startswith("https") else "KEY"
    for text in ("{}", "key = '{}'", "KEY={}\n", '"\\n{}"', "Bearer {}, "):
        assert replace_private(text.format(key)) == text.format(fake)
    assert replace_private("x" + key) == "x" + key or key.startswith(("https", "1"))


@pytest.mark.parametrize("text", [
    "sk-toggleable-content-with-a-long-name", "task-0123456789abcdef0123456789abcdef",
    "hf_hub_download", "npm_config_registry", "SK1234", "glpat-", "eyJ.eyJ.", "AKIA",
    "sk_live_", "xoxb-"])
def test_what_is_no_key(text):
    assert replace_private(text) == text


def test_secret_keys_that_a_name_tells():
    secret = (LETTERS + "/+")[-40:]
    for text in ("AWS_SECRET_ACCESS_KEY={}\n", 'aws_secret_access_key = "{}"',
                 '{{"aws_secret_access_key": "{}"}}'):
        assert replace_private(text.format(secret)) == text.format("KEY")
