//! The black-box suite of docs/security.md, run against the built binary: one file per group of rules, and one test per
//! id, whose name begins with it: `cargo test tH05`. Common terms are in [`contract`].
//!
//! Further spellings of the same case are in the unit tests of the part; cases that need a clock or a delayed answer are in other
//! modules of this binary.

#![allow(non_snake_case, reason = "tests are named after the ids of docs/security.md")]

mod browser;
mod cache;
mod config;
mod contract;
mod env_file;
mod framing;
mod host;
mod interception;
mod leakage;
mod page;
mod path;
mod ports;
mod refresh;
mod shutdown;
mod slow;
mod token_life;
mod upstream;

use std::collections::BTreeSet;
use std::process::Command;

/// All ids, by the groups of docs/security.md.
const IDS: [&str; 13] = [
    "tH01 tH02 tH03 tH05 tH06 tH08 tH09 tH11 tH13 tH14 tH15",
    "tO01 tO02 tO03 tO05 tO06 tO08 tO09 tO10 tO12 tO13 tO14 tO16 tO17 tO19 tO20 tO22 tO23 tO24",
    "tP01 tP02 tP03 tP04 tP05 tP06 tP08 tP10 tP12 tP13 tP15 tP16 tP18 tP19",
    "tR01 tR02 tR05 tR07 tR08 tR09 tR11 tR12 tR14 tR16 tR17 tR18 tR21 tR22 tR23 tR24 tR25 tR26",
    "tU01 tU02 tU03 tU04 tU06 tU07 tU09 tU11 tU12 tU13 tU14 tU16 tU17 tU19 tU21",
    "tK01 tK02 tK03 tK04 tK07 tK08 tK09 tK10 tK13 tK14 tK16 tK18 tK19",
    "tE01 tE02 tE03 tE04 tE05 tE07 tE08 tE10 tE11 tE13 tE15 tE16 tE18 tE19 tE21 tE23 tE25",
    "tT01 tT02 tT03 tT05",
    "tL01 tL02 tL04 tL05 tL06 tL08",
    "tF01 tF02 tF04 tF05 tF07 tF08 tF11 tF14",
    "tX01 tX03 tX04 tX05 tX07 tX08",
    "tS01 tS02 tS04 tS06 tS08 tS09 tS11 tS12 tS13 tS14",
    "tW01 tW02 tW03 tW06 tI01 tI02 tI04 tA01 tA03 tA05",
];

#[test]
fn every_id_is_the_name_of_a_test() {
    let this_binary = std::env::current_exe().expect("the path of this binary");
    let list = Command::new(this_binary).args(["--list", "policy::"]).output().expect("a list of tests").stdout;
    let list = String::from_utf8(list).expect("UTF-8");
    let names = list.lines().filter_map(|line| line.strip_suffix(": test")?.rsplit("::").next());
    let ids: BTreeSet<_> = names.filter_map(|name| name.split('_').next()).filter(|id| id.starts_with('t')).collect();
    assert_eq!(ids, IDS.iter().flat_map(|group| group.split(' ')).collect());
}
