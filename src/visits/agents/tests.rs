//! Real agents and referrers, and what they are.

use std::cell::Cell;
use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::patterns::BotListError;
use super::*;

const CHROME: &str =
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36";

fn agents(per_day: usize) -> Agents {
    Agents::new(BotList::default(), per_day)
}

/// Class, browser, system and device of each agent.
fn check(table: &[(&str, Class, &str, &str, &str)]) {
    let mut agents = agents(table.len());
    for (text, class, browser, os, device) in table {
        let agent = agents.look_up(text.as_bytes(), 0);
        let found = (agent.class, agent.browser.as_str(), agent.os.as_str(), agent.device);
        assert_eq!(found, (*class, *browser, *os, *device), "{text}");
    }
}

#[test]
fn people_are_clicks() {
    use Class::Click;
    check(&[
        (CHROME, Click, "Chrome", "Windows", "desktop"),
        (
            "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36",
            Click,
            "Chrome",
            "Mac OS X",
            "desktop",
        ),
        (
            "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36",
            Click,
            "Chrome",
            "Linux",
            "desktop",
        ),
        (
            "Mozilla/5.0 (X11; CrOS x86_64 14541.0.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36",
            Click,
            "Chrome",
            "Chrome OS",
            "desktop",
        ),
        (
            "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Mobile Safari/537.36",
            Click,
            "Chrome Mobile",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36",
            Click,
            "Chrome",
            "Android",
            "tablet",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) CriOS/138.0.7204.156 Mobile/15E148 Safari/604.1",
            Click,
            "Chrome Mobile iOS",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5 Mobile/15E148 Safari/604.1",
            Click,
            "Mobile Safari",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPad; CPU OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Mobile/15E148 Safari/604.1",
            Click,
            "Mobile Safari",
            "iOS",
            "tablet",
        ),
        (
            "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5 Safari/605.1.15",
            Click,
            "Safari",
            "Mac OS X",
            "desktop",
        ),
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:140.0) Gecko/20100101 Firefox/140.0",
            Click,
            "Firefox",
            "Windows",
            "desktop",
        ),
        (
            "Mozilla/5.0 (X11; Ubuntu; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
            Click,
            "Firefox",
            "Ubuntu",
            "desktop",
        ),
        (
            "Mozilla/5.0 (Android 14; Mobile; rv:140.0) Gecko/140.0 Firefox/140.0",
            Click,
            "Firefox Mobile",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) FxiOS/140.0 Mobile/15E148 Safari/605.1.15",
            Click,
            "Firefox iOS",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36 Edg/138.0.3351.83",
            Click,
            "Edge",
            "Windows",
            "desktop",
        ),
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/136.0.0.0 Safari/537.36 OPR/120.0.0.0",
            Click,
            "Opera",
            "Windows",
            "desktop",
        ),
        (
            "Opera/9.80 (J2ME/MIDP; Opera Mini/7.1.32052/29.3709; U; en) Presto/2.8.119 Version/11.10",
            Click,
            "Opera Mini",
            "",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Linux; Android 13; SAMSUNG SM-S918B) AppleWebKit/537.36 (KHTML, like Gecko) SamsungBrowser/25.0 Chrome/121.0.0.0 Mobile Safari/537.36",
            Click,
            "Samsung Internet",
            "Android",
            "mobile",
        ),
        ("Mozilla/5.0 (Windows NT 10.0; WOW64; Trident/7.0; rv:11.0) like Gecko", Click, "IE", "Windows", "desktop"),
        (
            "Mozilla/5.0 (Linux; U; Android 12; en-US; CPH2211) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/100.0.4896.58 UCBrowser/13.4.0.1306 Mobile Safari/537.36",
            Click,
            "UC Browser",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/134.0.0.0 YaBrowser/25.4.0.0 Safari/537.36",
            Click,
            "Yandex Browser",
            "Windows",
            "desktop",
        ),
        (
            "Mozilla/5.0 (Linux; Android 9; CUBOT_X19) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Mobile Safari/537.36",
            Click,
            "Chrome Mobile",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (SMART-TV; Linux; Tizen 6.0) AppleWebKit/537.36 (KHTML, like Gecko) 76.0.3809.146/6.0 TV Safari/537.36",
            Click,
            "Safari",
            "Tizen",
            "other",
        ),
        (
            "Mozilla/5.0 (Linux; Android 11; KFTRWI) AppleWebKit/537.36 (KHTML, like Gecko) Silk/120.3.1 like Chrome/120.0.6099.230 Safari/537.36",
            Click,
            "Amazon Silk",
            "Android",
            "tablet",
        ),
        (
            "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0 loadgen/0.1.0",
            Click,
            "Firefox",
            "Linux",
            "desktop",
        ),
        // In-app browsers.
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148 [FBAN/FBIOS;FBAV/470.0.0.39.93;FBBV/610183026;FBDV/iPhone14,5;FBMD/iPhone;FBSN/iOS;FBSV/17.5.1;FBSS/3;FBID/phone;FBLC/de_DE;FBOP/5]",
            Click,
            "Facebook",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Linux; Android 14; SM-A546B Build/UP1A.231005.007; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/126.0.6478.122 Mobile Safari/537.36 [FB_IAB/FB4A;FBAV/471.0.0.49.108;]",
            Click,
            "Facebook",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/21F90 Instagram 339.0.3.12.91 (iPhone14,5; iOS 17_5_1; de_DE; de; scale=3.00; 1170x2532; 615279183)",
            Click,
            "Instagram",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Linux; Android 14; Pixel 8 Build/AP2A.240705.005; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/126.0.6478.122 Mobile Safari/537.36 Line/14.10.0/IAB",
            Click,
            "LINE",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148 musical_ly_35.3.0 JsSdk/2.0 NetType/WIFI Channel/App Store ByteLocale/de Region/DE BytedanceWebview/d8a21c6",
            Click,
            "Mobile Safari UI/WKWebView",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Linux; Android 14; SM-S918B; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/126.0.6478.122 Mobile Safari/537.36 Snapchat/12.95.0.42",
            Click,
            "Snapchat",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148 Twitter for iPhone/10.50",
            Click,
            "Twitter",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148 [LinkedInApp]/9.29.7586",
            Click,
            "Mobile Safari UI/WKWebView",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148 [Pinterest/iOS]",
            Click,
            "Pinterest",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Linux; Android 13; M2101K6G; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/116.0.0.0 Mobile Safari/537.36 XWEB/1160065 MMWEBSDK/20231202 MicroMessenger/8.0.47.2560(0x28002F30) WeChat/arm64 Weixin NetType/WIFI Language/en ABI/arm64",
            Click,
            "Chrome Mobile WebView",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Linux; Android 16; Pixel 10 Build/CP1A.260305.018; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/146.0.7680.174 Mobile Safari/537.36 MetaIAB Facebook",
            Click,
            "Chrome Mobile WebView",
            "Android",
            "mobile",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) GSA/376.0.779177270 Mobile/15E148 Safari/604.1",
            Click,
            "Google",
            "iOS",
            "mobile",
        ),
        (
            "Mozilla/5.0 (Linux; Android 14; K) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/126.0.0.0 Mobile Safari/537.36 DuckDuckGo/5",
            Click,
            "DuckDuckGo Mobile",
            "Android",
            "mobile",
        ),
    ]);
}

#[test]
fn bots() {
    let mut agents = agents(1_000);
    for (text, name) in [
        ("facebookexternalhit/1.1 (+http://www.facebook.com/externalhit_uatext.php)", "facebookexternalhit"),
        (
            "meta-externalagent/1.1 (+https://developers.facebook.com/docs/sharing/webmasters/crawler)",
            "meta-externalagent",
        ),
        ("WhatsApp/2.23.20.0", "WhatsApp"),
        ("WhatsApp/2.24.13.77 A", "WhatsApp"),
        ("Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)", "Slackbot"),
        ("Slack-ImgProxy (+https://api.slack.com/robots)", "Slack-ImgProxy"),
        ("TelegramBot (like TwitterBot)", "TelegramBot"),
        ("Twitterbot/1.0", "Twitterbot"),
        ("Mozilla/5.0 (compatible; Discordbot/2.0; +https://discordapp.com)", "Discordbot"),
        ("LinkedInBot/1.0 (compatible; Mozilla/5.0; Apache-HttpClient +http://www.linkedin.com)", "LinkedInBot"),
        (
            "Mozilla/5.0 (Windows NT 6.1; WOW64) SkypeUriPreview Preview/0.5 skype-url-preview@microsoft.com",
            "SkypeUriPreview",
        ),
        ("Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)", "bingbot"),
        (
            "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm) Chrome/116.0.1938.76 Safari/537.36",
            "bingbot",
        ),
        ("Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)", "Googlebot"),
        (
            "Mozilla/5.0 (Linux; Android 6.0.1; Nexus 5X Build/MMB29P) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.7204.92 Mobile Safari/537.36 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
            "Googlebot",
        ),
        ("Googlebot-Image/1.0", "Googlebot-Image"),
        ("Mozilla/5.0 (compatible; YandexBot/3.0; +http://yandex.com/bots)", "yandex.com/bots"),
        ("Mozilla/5.0 (compatible; Baiduspider/2.0; +http://www.baidu.com/search/spider.html)", "Baiduspider"),
        (
            "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_5) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/13.1.1 Safari/605.1.15 (Applebot/0.1; +http://www.apple.com/go/applebot)",
            "Applebot",
        ),
        ("Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)", "AhrefsBot"),
        ("Mozilla/5.0 (compatible; SemrushBot/7~bl; +http://www.semrush.com/bot.html)", "SemrushBot"),
        ("Mozilla/5.0 (compatible; PetalBot;+https://webmaster.petalsearch.com/site/petalbot)", "PetalBot"),
        (
            "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; +https://openai.com/gptbot)",
            "GPTBot",
        ),
        (
            "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; ClaudeBot/1.0; +claudebot@anthropic.com)",
            "ClaudeBot",
        ),
        ("CCBot/2.0 (https://commoncrawl.org/faq/)", "CCBot"),
        ("Mozilla/5.0 (compatible; UptimeRobot/2.0; http://www.uptimerobot.com/)", "UptimeRobot"),
        ("Mozilla/5.0+(compatible; UptimeRobot/2.0; http://www.uptimerobot.com/)", "UptimeRobot"),
        ("Pingdom.com_bot_version_1.4_(http://www.pingdom.com/)", "Pingdom"),
        (
            "Better Uptime Bot Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/74.0.3729.169 Safari/537.36",
            "Better Uptime Bot",
        ),
        (
            "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) HeadlessChrome/138.0.0.0 Safari/537.36",
            "HeadlessChrome",
        ),
        ("ELB-HealthChecker/2.0", "ELB-HealthChecker"),
        ("kube-probe/1.30", "kube-probe"),
        ("Scrapy/2.11.2 (+https://scrapy.org)", "Scrapy"),
        ("python-requests/2.31 (somebot/1.0; +https://bot.example)", "somebot"),
        ("Mastodon/4.2.9 (http.rb/5.1.1; +https://mastodon.social/)", "Mastodon"),
        ("Iframely/1.3.1 (+https://iframely.com/docs/about)", "Iframely"),
        ("Mozilla/5.0 (compatible; nobody-knows-it/0.1; +https://nobody.example/about)", ""),
    ] {
        let agent = agents.look_up(text.as_bytes(), 0);
        assert_eq!((agent.class, agent.browser.as_str()), (Class::Bot, name), "{text}");
    }
}

#[test]
fn tools() {
    let mut agents = agents(1_000);
    for (text, name) in [
        ("", ""),
        (" ", ""),
        ("curl/8.5.0", "curl"),
        ("Wget/1.21.3 (linux-gnu)", "Wget"),
        ("python-requests/2.32.3", "python-requests"),
        ("Python-urllib/3.11", "Python-urllib"),
        ("python-httpx/0.27.0", "python-httpx"),
        ("Python/3.11 aiohttp/3.9.5", "aiohttp"),
        ("Go-http-client/2.0", "Go-http-client"),
        ("okhttp/4.12.0", "okhttp"),
        ("axios/1.7.2", "axios"),
        ("node", "node"),
        ("node-fetch/1.0 (+https://github.com/bitinn/node-fetch)", "node-fetch"),
        ("got (https://github.com/sindresorhus/got)", "got"),
        ("Java/17.0.11", "Java"),
        ("Java-http-client/21.0.3", "Java-http-client"),
        ("Apache-HttpClient/4.5.14 (Java/17.0.11)", "Apache-HttpClient"),
        ("Dalvik/2.1.0 (Linux; U; Android 14; Pixel 8 Build/AP2A.240705.005)", "Dalvik"),
        ("Dart/3.4 (dart:io)", "Dart"),
        ("GuzzleHttp/7", "GuzzleHttp"),
        ("libwww-perl/6.77", "libwww-perl"),
        ("PostmanRuntime/7.39.0", "PostmanRuntime"),
        ("Mozilla/5.0 (Windows NT; Windows NT 10.0; en-US) WindowsPowerShell/5.1.19041.4522", "WindowsPowerShell"),
        ("MyApp/3 CFNetwork/1496.0.7 Darwin/23.5.0", "CFNetwork"),
        ("k6/0.52.0 (https://k6.io/)", "k6"),
        ("Mozilla/5.0", "Mozilla"),
        ("something", "something"),
    ] {
        let agent = agents.look_up(text.as_bytes(), 0);
        assert_eq!((agent.class, agent.browser.as_str()), (Class::Tool, name), "{text}");
    }
}

#[test]
fn what_is_kept_of_a_text() {
    let long = format!("Mozilla/5.0 (compatible) {}", "é".repeat(400));
    for (text, want) in [
        (b"".as_slice(), String::new()),
        (b"a b", "a b".into()),
        (b"a\0b \xff", "a\u{fffd}b \u{fffd}".into()),
        (long.as_bytes(), long.chars().take(25 + 243).collect()),
    ] {
        let agent = agents(1).look_up(text, 0);
        assert_eq!(agent.text, want);
        assert_eq!((agent.id, agent.id == 0), (id(&want), text.is_empty()));
    }
    // The same on every instance and in every version: the store has them.
    assert_eq!(id("curl/8.5.0"), i64::from_str_radix("7d1d539047ef019", 16).unwrap());
}

#[test]
fn past_the_bound_of_a_day_families_are_kept() {
    let mut agents = agents(1);
    assert_eq!(agents.look_up(CHROME.as_bytes(), 5).text, CHROME);
    let other = CHROME.replace("138", "137");
    let folded = agents.look_up(other.as_bytes(), 5);
    assert_eq!(folded.text, "(click, Chrome, Windows, desktop)");
    assert_eq!((folded.id, folded.class, folded.browser.as_str()), (id(&folded.text), Class::Click, "Chrome"));
    assert_eq!(agents.look_up(CHROME.as_bytes(), 5).text, CHROME, "not new");
    assert_eq!(agents.look_up(b"", 5).id, 0, "no text");
    assert_eq!(agents.look_up(CHROME.replace("138", "136").as_bytes(), 6).text, CHROME.replace("138", "136"));
    for number in 0..FOLDED_PER_DAY_MAX {
        let name = format!("invented{number}");
        assert_eq!(agents.look_up(name.as_bytes(), 6).text, format!("(tool, {name}, , other)"));
    }
    let rest = agents.look_up(b"one-more", 6);
    assert_eq!((rest.text.as_str(), rest.class, rest.browser.as_str()), ("(tool, other)", Class::Tool, ""));
}

#[test]
fn referrers() {
    let mut referrers = Referrers::new(1_000);
    for (text, host) in [
        ("", ""),
        ("https://www.Example.org/a?b=c#d", "example.org"),
        ("http://user:secret@example.org:8080/", "example.org"),
        ("https://www.", "www."),
        ("https://b\u{fc}cher.example/", "xn--bcher-kva.example"),
        ("http://[2001:db8::1]/", "[2001:db8::1]"),
        ("android-app://com.Example.Mail/", "com.example.mail"),
        ("about:blank", "about:blank"),
        ("Example", "example"),
    ] {
        let referrer = referrers.look_up(text.as_bytes(), 0);
        assert_eq!((referrer.text.as_str(), referrer.host.as_str(), referrer.id), (text, host, id(text)));
    }
}

#[test]
fn past_the_bound_of_a_day_hosts_are_kept() {
    let mut referrers = Referrers::new(1);
    let mut check = |text: &str, day, want: (&str, &str)| {
        let referrer = referrers.look_up(text.as_bytes(), day);
        assert_eq!((referrer.text.as_str(), referrer.host.as_str(), referrer.id), (want.0, want.1, id(want.0)));
    };
    check("https://a.example/1", 0, ("https://a.example/1", "a.example"));
    check("https://a.example/2", 0, ("a.example", "a.example"));
    for number in 1..FOLDED_PER_DAY_MAX {
        let host = format!("{number}.example");
        check(&format!("https://{host}/"), 0, (&host, &host));
    }
    check("https://one-more.example/", 0, (OTHER, OTHER));
    check("https://a.example/3", 0, ("a.example", "a.example"));
    check("https://a.example/4", 1, ("https://a.example/4", "a.example"));
}

#[test]
fn a_list_of_more_bots() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bots");
    let open = |text: &[u8]| {
        fs::write(&path, text).unwrap();
        BotList::open(&path).map_err(|error| error.to_string().replace(&path.display().to_string(), "FILE"))
    };
    let list = open(b"# ours\n\n  ^OurProbe/ \r\nChrome/999\n").unwrap();
    let mut agents = Agents::new(list, 10);
    let mut class = |text: &str| agents.look_up(text.as_bytes(), 0).class;
    assert_eq!(class("OurProbe/3 (a b)"), Class::Bot);
    assert_eq!(class(&CHROME.replace("138", "999")), Class::Bot);
    assert_eq!(class(CHROME), Class::Click);

    assert_eq!(open(b""), Ok(BotList::default()));
    let refused = |text: &[u8]| open(text).unwrap_err();
    assert_eq!(
        refused(b"fine\n(unclosed\n"),
        "visits.bot_list: FILE, line 2: not a regular expression: unclosed group"
    );
    assert_eq!(
        refused(b"#\n#\na(?!b)"),
        "visits.bot_list: FILE, line 3: not a regular expression: look-around, including look-ahead and look-behind, is not supported"
    );
    assert_eq!(
        refused(&b"a\n".repeat(600_000)),
        "visits.bot_list: FILE has more than 1048576 bytes: leave patterns out"
    );
    assert!(refused(b"\xff").starts_with("visits.bot_list: FILE cannot be read: "));
    assert!(matches!(BotList::open(Path::new("/nowhere/bots")), Err(BotListError::Read { .. })));
}

thread_local! {
    /// What takes long is compiled once for all cases.
    static COMPILED: Cell<Option<Agents>> = Cell::new(Some(agents(0)));
}

proptest! {

    /// What a store gets fits it, whatever a client sends.
    #[test]
    fn any_bytes(texts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 1..20), per_day in 0_usize..10) {
        let mut agents = COMPILED.take().unwrap_or_else(|| agents(0));
        (agents.cache, agents.bound) = (Cache::default(), DailyBound::new(per_day, 3));
        let mut referrers = Referrers::new(per_day);
        for text in texts.iter().chain(&texts) {
            let agent = agents.look_up(text, 0);
            prop_assert_eq!(&agent, &agents.look_up(text, 0));
            let referrer = referrers.look_up(text, 0);
            for (id, text) in [(agent.id, &agent.text), (referrer.id, &referrer.text)] {
                prop_assert!(text.len() <= TEXT_BYTES_MAX && !text.contains('\0'));
                prop_assert_eq!((id == 0, id >= 0), (text.is_empty(), true));
            }
            prop_assert!(agent.browser.len() <= NAME_BYTES_MAX && agent.os.len() <= NAME_BYTES_MAX);
            prop_assert!(referrer.host.len() <= TEXT_BYTES_MAX && !referrer.host.contains('\0'));
        }
        COMPILED.set(Some(agents));
    }
}
