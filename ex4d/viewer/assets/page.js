// The videos of a row follow its first one.
for (const row of document.querySelectorAll(".row")) {
  const videos = [...row.querySelectorAll("video")];
  setInterval(() => {
    for (const video of videos.slice(1)) {
      if (Math.abs(video.currentTime - videos[0].currentTime) > 0.08) video.currentTime = videos[0].currentTime;
    }
  }, 500);
}
