//! The status page in a real browser: its content, live updates, buttons, accessibility and protection against attacks.

mod browser;

use std::time::Duration;

use browser::Browser;
use connect_sidecar::emulator::world::Connector;
use serde_json::{Value, json};

use crate::support::http::{APP, Request};
use crate::support::{SLACK_UID, Scene, Stage, fingerprint};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
/// A connector that is not linked to the project.
const UNLINKED: &str = "/v1/connect/token/salesforce%2Fcrm";

impl Stage {
    fn origin(&self) -> String {
        format!("http://{}", self.addr)
    }

    fn page(&self) -> String {
        format!("{}/_sidecar/", self.origin())
    }

    fn github(&self) -> Request {
        self.request("POST", "/v1/connect/token/github%2Facme-github").json(APP)
    }

    /// Opens the page with the key and waits until it is live; `None` without a browser.
    async fn browse(&self) -> Option<Browser> {
        let mut browser = Browser::start().await?;
        browser.run(json!(["open", format!("{}#key={}", self.page(), self.key())])).await;
        browser.says("link", "Live").await;
        Some(browser)
    }
}

#[tokio::test]
async fn it_shows_the_status_and_updates_live() {
    let mut stage = Scene::new().start().await;
    let Some(mut browser) = stage.browse().await else { return };
    let token = std::fs::read_to_string(stage.env_path()).expect("a file");
    let token = token.split('"').rev().nth(1).expect("a quoted token");
    browser.says("state", "Valid").await;
    for (id, text) in [
        ("project", "web"),
        ("owner", "acme"),
        ("environment", "development"),
        ("source", ".env.local"),
        ("fingerprint", &fingerprint(token)),
        ("instance", &format!("process {}", std::process::id())),
        ("upstream", &stage.emulator.url()),
        ("health", "Nothing sent yet"),
        ("month-title", "Token requests in March"),
        ("allowance-words", "0 of the 500 a month"),
        ("no-tokens", "No token is stored"),
        ("no-requests", "No request yet"),
    ] {
        assert!(browser.text(id).await.contains(text), "{id}: {}", browser.text(id).await);
    }
    let address: String = browser.evaluate("location.href + history.length").await;
    assert!(address.starts_with(&stage.page()) && !address.contains("key"), "{address}");

    stage.token(APP).send().await.token();
    for _ in 0..2 {
        stage.token(APP).send().await.token();
    }
    assert_eq!(stage.request("POST", UNLINKED).json(APP).send().await.status, 403);
    browser.until("document.querySelectorAll('#requests li').length === 4").await;
    let rows: Vec<String> =
        browser.evaluate("[...document.querySelectorAll('#requests li')].map((row) => row.innerText)").await;
    for (row, shown) in rows.iter().zip([
        ["salesforce/crm", "403", "forbidden", "vercel connect attach salesforce/crm"],
        [SLACK_UID, "hit", "200", "ms"],
        [SLACK_UID, "hit", "200", "ms"],
        [SLACK_UID, "miss", "200", "token · app"],
    ]) {
        assert!(shown.iter().all(|shown| row.contains(shown)), "{shown:?}: {row}");
    }
    for (id, text) in [
        ("billed", "0"),
        ("saved", "0"),
        ("money", "$0"),
        ("allowance-words", "from an upstream on this machine is not billed"),
        ("hits", "2"),
        ("misses", "2"),
        ("sent", "2"),
        ("tokens", SLACK_UID),
    ] {
        browser.says(id, text).await;
    }

    stage.pass(2 * HOUR);
    let fresh = stage.fresh_token(5 * HOUR);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    browser.says("fingerprint", &fingerprint(&fresh)).await;
    browser.says("refreshed", "Fresh token since").await;
    browser.until(r"/^(5 h 0|4 h 59) min · web/.test(document.title)").await;
    browser.says("no-tokens", "No token is stored").await;
    browser.assert_no_complaints(&stage.origin()).await;
}

#[tokio::test]
async fn the_time_left_follows_the_sidecars_clock() {
    let stage = Scene::new().token_life(2 * HOUR).start().await;
    let Some(mut browser) = stage.browse().await else { return };
    let arc = "Math.round(100 * (1 - document.getElementById('arc').getAttribute('stroke-dashoffset')))";
    for (left, words, part, mood) in [
        (90, r"^1 h (30|29) min$", 75, "good"),
        (30, r"^(30|29) min$", 25, "warn"),
        (1, r"^(1 min 0|59) s$", 1, "warn"),
    ] {
        let now = stage.clock.now();
        stage.pass(
            2 * HOUR - left * MINUTE - now.since(connect_sidecar::os::clock::Timestamp::from_millis(1_900_000_000_000)),
        );
        stage.token(APP).send().await;
        browser.until(&format!("/{words}/.test(document.getElementById('left').innerText)")).await;
        browser.until(&format!("Math.abs({arc} - {part}) <= 1")).await;
        let ring: (String, String, String) = browser
            .evaluate("(({ dataset, ariaValueNow, ariaValueText }) => [dataset.mood, ariaValueNow, ariaValueText])(document.getElementById('ring'))")
            .await;
        assert_eq!(ring.0, mood);
        assert!(ring.2.ends_with(" left"), "{ring:?}");
    }
    // Without another status, the page notices the expiry itself.
    browser.evaluate::<Value>("void (skewMs += 60_000)").await;
    browser.says("state", "Expired").await;
    browser.assert_no_complaints(&stage.origin()).await;
}

#[tokio::test]
async fn a_warning_has_a_copyable_command_and_is_announced_once() {
    let stage = Scene::new().token_life(30 * MINUTE).start().await;
    let Some(mut browser) = stage.browse().await else { return };
    browser.says("warnings", "The OIDC token of acme/web expires in 30 min.").await;
    browser.says("state", "Expiring").await;
    assert_eq!(browser.text("announcer").await, "The OIDC token of acme/web expires in 30 min.");
    browser.click("#warnings button").await;
    browser.says("warnings", "Copied").await;
    let copied: String = browser.evaluate("navigator.clipboard.readText()").await;
    assert_eq!(copied, "vercel env pull");

    browser.evaluate::<Value>("void (document.getElementById('announcer').textContent = 'before')").await;
    stage.pass(10 * MINUTE);
    // As when the user returns to the tab.
    browser.evaluate::<Value>("void document.dispatchEvent(new Event('visibilitychange'))").await;
    browser.says("warnings", "The OIDC token of acme/web expires in 20 min.").await;
    assert_eq!(browser.text("announcer").await, "before", "changed minutes are not announced");
    stage.pass(20 * MINUTE);
    browser.says("warnings", "The OIDC token of acme/web expired").await;
    assert!(browser.text("announcer").await.starts_with("The OIDC token of acme/web expired"));
    browser.says("state", "Expired").await;
    browser.assert_no_complaints(&stage.origin()).await;
}

#[tokio::test]
async fn buttons_evict_and_refresh() {
    let stage = Scene::new().start().await;
    let Some(mut browser) = stage.browse().await else { return };
    let tokens = async |browser: &mut Browser, connectors: &[&str]| {
        let shown = "[...document.querySelectorAll('#tokens strong')].map((name) => name.innerText).join()";
        browser.until(&format!("{shown} === {:?}", connectors.join(","))).await;
    };
    stage.token(APP).send().await.token();
    stage.github().send().await.token();
    tokens(&mut browser, &["github/acme-github", SLACK_UID]).await;
    browser.click("#tokens tr:nth-child(2) button").await;
    tokens(&mut browser, &["github/acme-github"]).await;
    browser.says("announcer", "Evicted slack/acme-slack: 1 token").await;
    browser.until("document.activeElement.id === 'tokens-title'").await;
    stage.token(APP).send().await.token();
    tokens(&mut browser, &["github/acme-github", SLACK_UID]).await;
    browser.click("#evict-all").await;
    tokens(&mut browser, &[]).await;
    assert_eq!(stage.status().await["cache"]["entries"], 0);

    // Whatever the outcome, the request itself is not refused.
    browser.click("#refresh").await;
    browser.until("!document.getElementById('refresh').disabled").await;
    let outcome = browser.text("refreshed").await;
    assert!(outcome.contains("efreshed") || outcome.contains("cannot refresh by itself"), "{outcome}");
    assert!(!outcome.contains("web pages"), "{outcome}");
    browser.run(json!(["complaints"])).await;
    for (status, body, shown) in [
        (200, "{}", "Refreshed at "),
        (404, r#"{"error":{"code":"route_not_found"}}"#, "cannot refresh by itself. Run vercel env pull."),
        (
            502,
            r#"{"error":{"message":"The Vercel CLI says <b>no</b>."}}"#,
            "Not refreshed. The Vercel CLI says <b>no</b>.",
        ),
        (500, "garbage", "Not refreshed. It answered 500."),
    ] {
        browser.run(json!(["answer", "/v1/refresh", status, body])).await;
        browser.click("#refresh").await;
        browser.says("refreshed", shown).await;
        browser.until("!document.getElementById('refresh').disabled").await;
    }
}

#[tokio::test]
async fn the_request_list_can_be_paused_and_is_bounded() {
    let stage = Scene::new().start().await;
    let Some(mut browser) = stage.browse().await else { return };
    let rows = |number: usize| format!("document.querySelectorAll('#requests li').length === {number}");
    stage.token(APP).send().await.token();
    browser.until(&rows(1)).await;
    for (hold, release) in [
        (json!(["click", "#pause"]), json!(["click", "#pause"])),
        (json!(["hover", "#requests li"]), json!(["hover", "h1"])),
    ] {
        let before: usize = browser.evaluate("document.querySelectorAll('#requests li').length").await;
        browser.run(hold).await;
        stage.token(APP).send().await.token();
        browser.says("held", "Held: 1 new").await;
        assert!(browser.evaluate::<bool>(&rows(before)).await);
        browser.run(release).await;
        browser.until(&rows(before + 1)).await;
        browser.until("document.getElementById('held').hidden").await;
    }
    for _ in 0..120 {
        stage.token(APP).send().await.token();
    }
    stage.github().send().await.token();
    browser.until("document.querySelector('#requests li').innerText.includes('github')").await;
    assert!(browser.evaluate::<bool>(&rows(100)).await);
}

#[tokio::test]
async fn axe_reports_nothing_and_the_page_fits_on_a_phone() {
    let stage = Scene::new().token_life(30 * MINUTE).start().await;
    let Some(mut browser) = stage.browse().await else { return };
    stage.token(APP).send().await.token();
    stage.request("POST", UNLINKED).json(APP).send().await;
    browser.says("requests", "vercel connect attach").await;
    browser.says("tokens", SLACK_UID).await;
    let pictures = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
    std::fs::create_dir_all(&pictures).expect("a directory");
    for is_open in [true, false] {
        if !is_open {
            browser.evaluate::<Value>("void sessionStorage.clear()").await;
            browser.run(json!(["open", stage.page()])).await;
        }
        for (width, scheme) in [(1040, "light"), (1040, "dark"), (320, "light"), (320, "dark")] {
            browser.run(json!(["look", width, scheme])).await;
            assert_eq!(browser.run(json!(["axe"])).await, json!([]), "{width} {scheme} {is_open}");
            let widest: u32 = browser
                .evaluate("Math.max(...[...document.querySelectorAll('body :not(.visually-hidden)')].map((e) => e.getBoundingClientRect().right))")
                .await;
            assert!(widest <= width, "{widest} of {width}");
            let name = format!("{width}-{scheme}{}.png", if is_open { "" } else { "-closed" });
            browser.run(json!(["picture", pictures.join(name)])).await;
        }
    }
    browser.evaluate::<Value>("document.querySelector('h1').remove(), document.documentElement.lang = ''").await;
    assert_ne!(browser.run(json!(["axe"])).await, json!([]), "axe does report violations");
}

#[tokio::test]
async fn all_controls_are_reachable_by_keyboard_with_visible_focus() {
    let stage = Scene::new().token_life(30 * MINUTE).start().await;
    let Some(mut browser) = stage.browse().await else { return };
    stage.token(APP).send().await.token();
    stage.request("POST", UNLINKED).json(APP).send().await;
    browser.says("requests", "vercel connect attach").await;
    browser.says("tokens", SLACK_UID).await;
    let mut names = Vec::new();
    for _ in 0..6 {
        browser.run(json!(["press", "Tab"])).await;
        let (name, outline): (String, String) = browser
            .evaluate("[document.activeElement.textContent, getComputedStyle(document.activeElement).outlineStyle]")
            .await;
        assert_eq!(outline, "solid", "{name}");
        names.push(name);
    }
    assert_eq!(
        names,
        [
            "Copy vercel env pull",
            "Refresh now",
            "Evict all",
            "Evict slack/acme-slack",
            "Pause",
            "Copy vercel connect attach salesforce/crm"
        ]
    );
    browser.run(json!(["press", "Enter"])).await;
    browser.says("announcer", "Copied: vercel connect attach salesforce/crm").await;
}

/// Asserts that no text of the page contains invisible characters.
async fn assert_no_invisible_characters(browser: &mut Browser) {
    let labels = "[...document.querySelectorAll('[aria-label]')].map((labelled) => labelled.ariaLabel)";
    let invisible = "/(?![\\n\\t])[\\p{Cc}\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]/u";
    let texts = format!("[document.title, document.body.innerText, ...{labels}]");
    let found: Vec<String> = browser.evaluate(&format!("{texts}.filter((text) => {invisible}.test(text))")).await;
    assert_eq!(found, [""; 0]);
}

#[tokio::test]
async fn hostile_names_are_shown_as_text() {
    const UID: &str = "<img src=x onerror=alert(1)>`vercel x`\u{202e}";
    // One quoted argument of the suggested command.
    const COMMAND: &str = "a`b`vercel rm -rf ~`c";
    // Would look different from what is copied.
    const REVERSED: &str = "\u{202e}mrc";
    let scene = Scene::new().world(|world| {
        let project = world.projects[0].id.clone();
        world.connectors.push(Connector::new(UID, "scl_evil", &project));
        for (uid, id) in [(COMMAND, "scl_command"), (REVERSED, "scl_reversed")] {
            world.connectors.push(Connector { links: Vec::new(), ..Connector::new(uid, id, &project) });
        }
    });
    let mut stage = scene.start().await;
    let path = |uid: &str| {
        format!("/v1/connect/token/{}", percent_encoding::utf8_percent_encode(uid, percent_encoding::NON_ALPHANUMERIC))
    };
    let Some(mut browser) = stage.browse().await else { return };
    assert_eq!(stage.request("POST", &path(UID)).json(APP).send().await.status, 200);
    assert_eq!(stage.request("POST", &path(COMMAND)).json(APP).send().await.status, 403);
    assert_eq!(stage.request("POST", &path(REVERSED)).json(APP).send().await.status, 403);
    let shown = UID.replace('\u{202e}', r"\u{202e}");
    browser.says("tokens", &shown).await;
    browser.says("requests", &shown).await;
    browser.says("requests", r"vercel connect attach '\u{202e}mrc'").await;
    assert_no_invisible_characters(&mut browser).await;
    let token = stage.token_of(|subject| {
        subject.owner = "<script>alert(2)</script>".into();
        subject.project = "\u{1b}[31m<b>web</b>\u{202e}".into();
    });
    stage.write_env(&token);
    stage.uses(&token).await;
    browser.says("owner", "<script>alert(2)</script>").await;
    browser.says("project", r"\u{1b}[31m<b>web</b>\u{202e}").await;
    browser.says("requests", "vercel rm -rf").await;
    let made: (usize, usize) = browser
        .evaluate("['img, main script, main b', '#requests .command'].map((those) => document.querySelectorAll(those).length)")
        .await;
    assert_eq!(made, (0, 1), "no elements from names, and no copy button for a deceptive command");
    let whole: String = browser.evaluate("document.querySelector('#requests .command code').textContent").await;
    assert_eq!(whole, format!("vercel connect attach '{COMMAND}'"));
    assert_no_invisible_characters(&mut browser).await;
    let bidi: String =
        browser.evaluate("getComputedStyle(document.querySelector('#requests strong')).unicodeBidi").await;
    assert_eq!(bidi, "isolate", "it does not affect the text around it");
    browser.assert_no_complaints(&stage.origin()).await;
}

#[tokio::test]
async fn it_stores_only_the_key_and_loads_nothing_else() {
    let stage = Scene::new().start().await;
    let Some(mut browser) = stage.browse().await else { return };
    let kept: (String, usize, usize) =
        browser.evaluate("[document.cookie, localStorage.length, sessionStorage.length]").await;
    assert_eq!(kept, (String::new(), 0, 1), "the key, for this tab");
    let html: String = browser.evaluate("document.documentElement.outerHTML").await;
    assert!(!html.contains(&stage.key()));
    browser.assert_no_complaints(&stage.origin()).await;
    for (attack, rule) in [
        (
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'alert(1)'}))",
            "script-src",
        ),
        ("document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/'}))", "img-src"),
        ("document.body.append(Object.assign(document.createElement('style'), {textContent: 'p{}'}))", "style-src"),
        ("void fetch('http://127.0.0.1:9/').catch(() => {})", "connect-src"),
    ] {
        browser.run(json!(["evaluate", format!("void ({attack})")])).await;
        browser.until("new Promise((done) => setTimeout(() => done(true)))").await;
        let complaints = browser.run(json!(["complaints"])).await.to_string();
        assert!(complaints.contains(rule), "{attack}: {complaints}");
    }
}

#[tokio::test]
async fn without_the_key_it_explains_how_to_open_it() {
    let stage = Scene::new().start().await;
    let Some(mut browser) = Browser::start().await else { return };
    let closed = async |browser: &mut Browser, title: &str| {
        browser.says("closed", title).await;
        browser.says("closed", "connect-sidecar status --open").await;
        assert!(!browser.evaluate::<bool>("document.getElementById('closed').hidden").await);
        assert!(browser.evaluate::<bool>("document.getElementById('board').hidden").await);
    };
    browser.run(json!(["open", stage.page()])).await;
    closed(&mut browser, "Open this page with its key").await;
    browser.click("#closed button").await;
    browser.says("closed", "Copied").await;
    browser.assert_no_complaints(&stage.origin()).await;

    browser.run(json!(["open", format!("{}#key=guessed", stage.page())])).await;
    closed(&mut browser, "This key is not good").await;
    // As when `status --open` reuses the tab.
    browser.evaluate::<Value>(&format!("void (location.hash = 'key={}')", stage.key())).await;
    browser.says("link", "Live").await;
    assert!(browser.evaluate::<bool>("document.getElementById('closed').hidden").await);
    let address: String = browser.evaluate("location.href").await;
    assert_eq!(address, stage.page());
}

#[tokio::test]
async fn it_can_be_reloaded_until_the_key_is_refused() {
    let mut stage = Scene::new().start().await;
    let Some(mut browser) = stage.browse().await else { return };
    // Addresses without the full path redirect to it.
    for path in ["/_sidecar/", "/", "/_sidecar"] {
        browser.run(json!(["open", format!("{}{path}", stage.origin())])).await;
        browser.says("link", "Live").await;
        assert_eq!(browser.evaluate::<String>("location.href").await, stage.page(), "{path}");
    }
    browser.assert_no_complaints(&stage.origin()).await;
    let (page, port) = (stage.page(), stage.addr.port());
    stage.stop().await;
    let again = Scene::new().env("CONNECT_SIDECAR_PORT", &port.to_string()).start().await;
    assert_eq!(again.page(), page);
    browser.run(json!(["open", page])).await;
    browser.says("closed", "This key is not good").await;
    browser.says("closed", "connect-sidecar status --open").await;
    assert_eq!(browser.evaluate::<usize>("sessionStorage.length").await, 0, "the key is forgotten");
    browser.run(json!(["open", page])).await;
    browser.says("closed", "Open this page with its key").await;
    browser.run(json!(["open", format!("{page}#key={}", again.key())])).await;
    browser.says("link", "Live").await;
}

#[tokio::test]
async fn browsers_are_redirected_to_it_and_programs_get_404_with_its_path() {
    let stage = Scene::new().start().await;
    for path in ["/", "/_sidecar"] {
        let reply = stage.request("GET", path).header("accept", "*/*").send().await;
        reply.assert_refused(404, "route_not_found", path);
        let error = &reply.json()["error"];
        assert!(error["message"].as_str().is_some_and(|message| message.contains("/_sidecar/")), "{error}");
        assert_eq!(error["hint"], "connect-sidecar status --open");
        let typed = |site: &str| {
            let request = stage.request("GET", path).header("sec-fetch-site", site);
            request.header("sec-fetch-mode", "navigate").header("sec-fetch-dest", "document")
        };
        // Browsers send no Sec-Fetch headers to untrustworthy origins.
        let untrusted = stage.request("GET", path).header("accept", "text/html,application/xml;q=0.9,*/*;q=0.8");
        for request in [typed("none"), typed("same-origin"), untrusted] {
            let redirect = request.send().await;
            assert_eq!((redirect.status, redirect.header("location")), (303, Some("/_sidecar/")), "{redirect:?}");
            assert_eq!(redirect.header("cache-control"), Some("no-store"));
        }
        for site in ["cross-site", "same-site"] {
            typed(site).send().await.assert_refused(403, "browser_request_refused", site);
        }
        stage.request("POST", path).json(APP).send().await.assert_refused(404, "route_not_found", path);
        for method in ["POST", "PUT", "DELETE"] {
            let request = stage.request(method, path).header("accept", "text/html");
            request.send().await.assert_refused(404, "route_not_found", method);
        }
    }
}

#[tokio::test]
async fn it_reconnects_and_reports_a_restarted_sidecar() {
    let mut stage = Scene::new().start().await;
    let Some(mut browser) = stage.browse().await else { return };
    stage.token(APP).send().await.token();
    browser.says("tokens", SLACK_UID).await;
    let (origin, port) = (stage.origin(), stage.addr.port());
    stage.stop().await;
    browser.says("link", "Reconnecting").await;
    assert!(browser.text("tokens").await.contains(SLACK_UID), "the last status stays visible");
    let again = Scene::new().env("CONNECT_SIDECAR_PORT", &port.to_string()).start().await;
    assert_eq!(again.origin(), origin);
    browser.says("closed", "The sidecar has restarted").await;
    browser.says("closed", "connect-sidecar status --open").await;
}

#[tokio::test]
async fn other_origins_can_neither_frame_nor_read_it() {
    let stage = Scene::new().start().await;
    let Some(mut browser) = Browser::start().await else { return };
    let (page, key) = (stage.page(), stage.key());
    // One on the internet, and one on this machine, which counts as the same site.
    for evil in ["http://evil.example/", "http://127.0.0.1:9/"] {
        browser.run(json!(["pretend", evil, format!("<iframe src='{page}'></iframe>")])).await;
        browser.run(json!(["open", evil])).await;
        let framed = browser.run(json!(["frames"])).await.to_string();
        assert!(!framed.contains("connect-sidecar") && !framed.contains("key"), "{evil}: {framed}");
        let read = format!(
            "Promise.all(['', 'v1/status', 'v1/events'].flatMap((path) => [{{}}, {{ headers: {{ 'Sidecar-Key': '{key}' }} }}]
             .map((options) => fetch('{page}' + path, options).then((reply) => reply.text(), () => 'nothing'))))"
        );
        let read: Vec<String> = browser.evaluate(&read).await;
        assert_eq!(read, ["nothing"; 6], "{evil}");
    }
}
