//! An allocation as memory at addresses.

use xpm_mapping::{Advice, Array, AttachOptions, Attachment, Budget, Faults, Space, SpaceOptions, Token};

/// XPM_ALLOCATOR=http://HOST:7700 external NAME, where NAME was made by: xpm alloc create NAME --size 64MiB
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1).ok_or("usage: external NAME")?;
    let mut options = AttachOptions::new(std::env::var("XPM_ALLOCATOR")?.parse()?, name.parse()?);
    if let Some(file) = std::env::var_os("XPM_TOKEN_FILE") {
        options.token = Some(Token::load(file.as_ref())?);
    }
    let (attachment, volume) = Attachment::attach(&options)?;
    let local = SpaceOptions { budget: Budget::Fixed(4 << 20), faults: Faults::Handled(1), kept: 0 };
    let space = Space::open(volume, &local)?;

    // A piece of memory that holds zeros. No message to anyone.
    let mut mapping = space.carve(16 << 20)?;
    mapping.put(8 << 20, b"hello")?;
    let mut word = [0; 5];
    mapping.get(8 << 20, &mut word)?;
    assert_eq!(&word, b"hello");
    mapping.resize(8 << 20)?;
    drop(mapping);

    // A Vec whose elements are external.
    let mut numbers: Array<u64> = space.array(2 << 20)?;
    numbers.extend(0..2 << 20);
    numbers.allocator().advise(&numbers, Advice::Sequential)?;
    println!("the sum is {}", numbers.iter().sum::<u64>());
    drop(numbers);

    drop(space);
    attachment.detach()?;
    Ok(())
}
