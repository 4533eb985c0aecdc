//! Configuration files and flags: defaults, limits and refusals.

use super::*;

fn cli(arguments: &str) -> anyhow::Result<Config> {
    let all = std::iter::once("xpm-appliance").chain(arguments.split_whitespace());
    Cli::try_parse_from(all)?.settle()
}

fn complaint(arguments: &str) -> String {
    format!("{:#}", cli(arguments).unwrap_err())
}

fn file(text: &str) -> Result<Settings, xpm_control::config::ConfigError> {
    xpm_control::config::parse(Path::new("appliance.toml"), text)
}

#[test]
fn defaults_follow_from_the_memory_size() {
    let config = cli("--memory 64GiB --name a").unwrap();
    assert_eq!(config.stock, Stock { region_len: 256 << 20, target: 8 << 30 });
    assert_eq!(config.backing, Backing::Memfd);
    assert!(config.lock && !config.insecure);
    assert_eq!(config.unix, Path::new("/run/xpm-appliance/nbd.sock"));
    let small = cli("--memory 300MiB --name a").unwrap();
    assert_eq!(small.stock, Stock { region_len: 64 << 20, target: 256 << 20 });
    assert_eq!(cli("--memory 16MiB --name a").unwrap().stock.region_len, 16 << 20);
}

#[test]
fn complaints_name_the_remedy() {
    for (arguments, words) in [
        ("", "give --memory SIZE"),
        ("--memory 0", "at least 16MiB"),
        ("--memory 1MiB", "at least 16MiB"),
        ("--memory 1X", "write it like"),
        ("--memory 1GiB --region-size 100MiB", "power of two"),
        ("--memory 1GiB --region-size 8MiB", "16MiB to 64GiB"),
        ("--memory 1GiB --region-size 2GiB", "lower it"),
        ("--memory 1GiB --ready 2GiB", "lower it"),
        ("--memory 1GiB --threads 0", "1 to 1024"),
        ("--memory 1GiB --spin 1s", "at most 10ms"),
        ("--memory 1GiB --listen 0.0.0.0:1", "--token-file"),
        ("--memory 1GiB --backing disk", "memfd or file:PATH"),
        ("--memory 1GiB --rdma yes", "auto, off or ADDRESS:PORT"),
        ("--memory 1GiB --backing file:", "path of a file"),
        ("--memory 1GiB --backing file:/x --huge", "choose one"),
        ("--memory 1GiB --name a/b", "a name"),
        ("--memory 1GiB --config /nonexistent.toml", "/nonexistent.toml"),
    ] {
        let line = complaint(arguments);
        assert!(line.contains(words), "{arguments}: {line}");
    }
}

#[test]
fn rdma_is_served_automatically_unless_configured() {
    let of = |words: &str| cli(&format!("--memory 1GiB --name a {words}")).unwrap().rdma;
    assert_eq!(of(""), Rdma::Auto);
    assert_eq!(of("--rdma off"), Rdma::Off);
    assert_eq!(of("--rdma 192.0.2.1:5"), Rdma::At("192.0.2.1:5".parse().unwrap()));
    assert_eq!(file("rdma = 'off'").unwrap().rdma, Some(Rdma::Off));
}

#[test]
fn the_command_line_wins_over_the_file() {
    let from_file = file(
        "memory = '1GiB'\nname = 'f'\nbacking = 'file:/dev/dax0.0'\nlisten = '127.0.0.1:1'\nspin = '20us'\n\
         ready = 0\nno-lock = true\n",
    )
    .unwrap();
    let given = Settings { memory: Some(ByteSize(2 << 30)), ..Settings::default() };
    let config = given.over(from_file).settle().unwrap();
    assert_eq!(config.capacity, 2 << 30);
    assert_eq!(config.name.as_str(), "f");
    assert_eq!(config.backing, Backing::File("/dev/dax0.0".into()));
    assert_eq!(config.spin, Duration::from_micros(20));
    assert_eq!(config.stock.target, 0);
    assert!(!config.lock);
}

#[test]
fn a_misspelt_key_is_an_error() {
    let line = file("memory = '1GiB'\nregion_size = '16MiB'\n").unwrap_err().to_string();
    assert!(line.starts_with("appliance.toml:2:") && line.contains("region_size"), "{line}");
    assert!(file("backing = 'disk'\n").unwrap_err().to_string().contains("file:PATH"));
    assert!(file("memory = '16MiB'\nmemory = '1GiB'\n").is_err());
}
